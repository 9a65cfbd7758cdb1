// The CUDA kernel of crop_resize for the CPU, with plain C arguments: those of bindings.cpp.
#include "../../csrc/crop_resize.cu"

extern "C" void crop_resize_emulated(const std::int64_t* images, int pixel, const double* boxes,
                                     const std::int64_t* index, const std::int64_t* shape, bool cubic,
                                     const float* gain, const float* bias, void* out, int dtype) {
  mtedit::CropResize in{};
  in.images.first = {reinterpret_cast<const void*>(images[0]), images[1], images[2], images[3], images[4], images[5]};
  in.images.image_stride = images[6];
  in.images.count = images[7];
  in.images.table = reinterpret_cast<const mtedit::Image*>(images[8]);
  in.channels = static_cast<int>(shape[1]);
  in.pixel = static_cast<mtedit::Pixel>(pixel);
  in.boxes = boxes;
  in.index = index;
  in.crops = shape[0];
  in.height = shape[2];
  in.width = shape[3];
  in.cubic = cubic;
  std::copy(gain, gain + shape[1], in.gain);
  std::copy(bias, bias + shape[1], in.bias);
  in.out = out;
  in.out_dtype = static_cast<mtedit::DType>(dtype);
  mtedit::crop_resize_cuda(in, 0, 0);
}
