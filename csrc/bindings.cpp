// Python hands over data pointers as integers; mtedit_fast/ops/_cpp.py has checked shapes, dtypes and contiguity.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "crop_resize.h"
#include "sde_step.h"
#include "seeded_noise.h"
#include "token_similarity.h"
#include "velocity_loss.h"
#ifdef MTEDIT_CUDA_ARCHS
#include "device_copy.h"
#endif

namespace py = pybind11;

namespace {

using Pointer = std::uintptr_t;
using PythonArray = std::pair<Pointer, int>;  // data_ptr (0: absent), dtype code

mtedit::DType dtype_of(int code) {
  if (code < 0 || code > 2) throw std::invalid_argument("dtype code must be 0, 1 or 2, got " + std::to_string(code));
  return static_cast<mtedit::DType>(code);
}

mtedit::Array array_of(const PythonArray& array) {
  return {reinterpret_cast<const void*>(array.first), dtype_of(array.second)};
}

template <class T>
T* pointer(Pointer address) {
  return reinterpret_cast<T*>(address);
}

// The arguments that forward and backward share.
mtedit::SDEStep step_of(const PythonArray& sample, const PythonArray& velocity, const PythonArray& noise,
                        const PythonArray& prev_sample, Pointer seed, Pointer table, Pointer step, std::int64_t rows,
                        std::int64_t batch, std::int64_t numel, int out_dtype, int log_prob, bool round_before,
                        int threads) {
  if (log_prob < 0 || log_prob > 2) {
    throw std::invalid_argument("log_prob_mode must be 0, 1 or 2, got " + std::to_string(log_prob));
  }
  const mtedit::SDEStep in{array_of(sample),
                           array_of(velocity),
                           array_of(noise),
                           array_of(prev_sample),
                           pointer<const std::int64_t>(seed),
                           pointer<const float>(table),
                           pointer<const std::int64_t>(step),
                           rows,
                           batch,
                           numel,
                           dtype_of(out_dtype),
                           static_cast<mtedit::LogProb>(log_prob),
                           round_before,
                           threads};
  const bool random = in.noise.data || in.prev_sample.data || in.seed || numel == 0;
  for (std::int64_t b = 0; !random && b < batch; ++b) {
    const std::int64_t row = in.step[b];
    if (row >= 0 && row < rows && in.table[4 * row + 2] != 0.0f) {
      throw std::invalid_argument("step " + std::to_string(row) + " is stochastic: pass noise, seed or prev_sample");
    }
  }
  return in;
}

mtedit::VelocityLoss velocities_of(const PythonArray& theta, const PythonArray& old, const PythonArray& target,
                                   const PythonArray& reference, std::int64_t batch, std::int64_t numel, int threads) {
  return {array_of(theta), array_of(old), array_of(target), array_of(reference), batch, numel, threads};
}

// Rows, tokens, width, and the strides of rows and tokens.
using TokenShape = std::array<std::int64_t, 5>;

mtedit::Tokens tokens_of(const PythonArray& tokens, const TokenShape& shape) {
  return {array_of(tokens), shape[0], shape[1], shape[2], shape[3], shape[4]};
}

// data_ptr, height, width and row, pixel and channel stride of the first image, the stride between images, their
// number, and a table of the first six numbers for each where their sizes differ (0: absent).
using ImageArray = std::array<std::int64_t, 9>;

mtedit::CropResize crop_of(const ImageArray& images, int pixel, Pointer boxes, Pointer index,
                           const std::array<std::int64_t, 4>& shape, bool cubic, const std::vector<float>& gain,
                           const std::vector<float>& bias, const PythonArray& out) {
  if (pixel < 0 || pixel > 3) throw std::invalid_argument("pixel code must be 0 to 3, got " + std::to_string(pixel));
  const std::int64_t channels = shape[1];
  const auto given = static_cast<std::size_t>(channels);
  if (channels < 1 || channels > mtedit::kMaxChannels || gain.size() != given || bias.size() != given) {
    throw std::invalid_argument("1 to 4 channels, each with a gain and a bias, expected: " + std::to_string(channels));
  }
  mtedit::CropResize in{};
  in.images.first = {pointer<const void>(images[0]), images[1], images[2], images[3], images[4], images[5]};
  in.images.image_stride = images[6];
  in.images.count = images[7];
  in.images.table = pointer<const mtedit::Image>(images[8]);
  in.channels = static_cast<int>(channels);
  in.pixel = static_cast<mtedit::Pixel>(pixel);
  in.boxes = pointer<const double>(boxes);
  in.index = pointer<const std::int64_t>(index);
  in.crops = shape[0];
  in.height = shape[2];
  in.width = shape[3];
  in.cubic = cubic;
  std::copy(gain.begin(), gain.end(), in.gain);
  std::copy(bias.begin(), bias.end(), in.bias);
  in.out = pointer<void>(out.first);
  in.out_dtype = dtype_of(out.second);
  return in;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "CPU kernels of mtedit_fast, free of torch: pointers and sizes in, nothing out.";
#ifdef _OPENMP
  m.attr("openmp") = true;
#else
  m.attr("openmp") = false;
#endif

  m.def("sde_step_forward",
        [](const PythonArray& sample, const PythonArray& velocity, const PythonArray& noise,
           const PythonArray& prev_sample, Pointer seed, Pointer table, Pointer step, std::int64_t rows,
           std::int64_t batch, std::int64_t numel, int out_dtype, int log_prob_mode, bool round_before, int threads,
           Pointer prev_out, Pointer log_prob_out, Pointer mean_out) {
          const mtedit::SDEStep in = step_of(sample, velocity, noise, prev_sample, seed, table, step, rows, batch,
                                             numel, out_dtype, log_prob_mode, round_before, threads);
          py::gil_scoped_release release;
          mtedit::sde_step_forward(in, pointer<void>(prev_out), pointer<float>(log_prob_out), pointer<float>(mean_out));
        });

  m.def("sde_step_backward",
        [](const PythonArray& sample, const PythonArray& velocity, const PythonArray& noise,
           const PythonArray& prev_sample, Pointer seed, Pointer table, Pointer step, std::int64_t rows,
           std::int64_t batch, std::int64_t numel, int out_dtype, int log_prob_mode, bool round_before, int threads,
           const PythonArray& grad_prev, Pointer grad_log_prob, Pointer grad_mean, Pointer grad_sample,
           Pointer grad_velocity) {
          const mtedit::SDEStep in = step_of(sample, velocity, noise, prev_sample, seed, table, step, rows, batch,
                                             numel, out_dtype, log_prob_mode, round_before, threads);
          const mtedit::Array incoming = array_of(grad_prev);
          py::gil_scoped_release release;
          mtedit::sde_step_backward(in, incoming, pointer<const float>(grad_log_prob), pointer<const float>(grad_mean),
                                    pointer<void>(grad_sample), pointer<void>(grad_velocity));
        });

  m.def("velocity_moments",
        [](const PythonArray& theta, const PythonArray& old, const PythonArray& target, const PythonArray& reference,
           std::int64_t batch, std::int64_t numel, int threads, bool mixed, float beta, Pointer means) {
          const mtedit::VelocityLoss in = velocities_of(theta, old, target, reference, batch, numel, threads);
          py::gil_scoped_release release;
          mtedit::velocity_moments(in, mixed, beta, pointer<float>(means));
        });

  m.def("velocity_loss_backward",
        [](const PythonArray& theta, const PythonArray& old, const PythonArray& target, const PythonArray& reference,
           std::int64_t batch, std::int64_t numel, int threads, Pointer coefficients, Pointer grad) {
          const mtedit::VelocityLoss in = velocities_of(theta, old, target, reference, batch, numel, threads);
          py::gil_scoped_release release;
          mtedit::velocity_loss_backward(in, pointer<const float>(coefficients), pointer<void>(grad));
        });

  m.def("seeded_noise", [](Pointer seed, Pointer step, std::int64_t batch, std::int64_t numel, Pointer out, int dtype,
                           int threads) {
    const mtedit::DType out_dtype = dtype_of(dtype);
    py::gil_scoped_release release;
    mtedit::seeded_noise(pointer<const std::int64_t>(seed), pointer<const std::int64_t>(step), batch, numel,
                         pointer<void>(out), out_dtype, threads);
  });

  m.def("token_pool", [](const PythonArray& tokens, const TokenShape& shape, Pointer index, std::int64_t count,
                         Pointer weights, bool normalize, int threads, Pointer out) {
    const mtedit::Tokens in = tokens_of(tokens, shape);
    py::gil_scoped_release release;
    mtedit::token_pool(in, pointer<const std::int64_t>(index), count, pointer<const float>(weights), normalize, threads,
                       pointer<float>(out));
  });

  m.def("token_pool_backward", [](const PythonArray& tokens, const TokenShape& shape, Pointer index, std::int64_t count,
                                  Pointer weights, bool normalize, int threads, Pointer grad_pooled, Pointer grad) {
    const mtedit::Tokens in = tokens_of(tokens, shape);
    py::gil_scoped_release release;
    mtedit::token_pool_backward(in, pointer<const std::int64_t>(index), count, pointer<const float>(weights),
                                pointer<const float>(grad_pooled), normalize, threads, pointer<void>(grad));
  });

  m.def("crop_resize",
        [](const ImageArray& images, int pixel, Pointer boxes, Pointer index,
           const std::array<std::int64_t, 4>& shape, bool cubic, const std::vector<float>& gain,
           const std::vector<float>& bias, const PythonArray& out, int threads) {
          const mtedit::CropResize in = crop_of(images, pixel, boxes, index, shape, cubic, gain, bias, out);
          py::gil_scoped_release release;
          mtedit::crop_resize(in, threads);
        });

#ifdef MTEDIT_CUDA_ARCHS
  m.def("crop_resize_cuda",
        [](const ImageArray& images, int pixel, Pointer boxes, Pointer index,
           const std::array<std::int64_t, 4>& shape, bool cubic, const std::vector<float>& gain,
           const std::vector<float>& bias, const PythonArray& out, Pointer stream, int device) {
          const mtedit::CropResize in = crop_of(images, pixel, boxes, index, shape, cubic, gain, bias, out);
          py::gil_scoped_release release;
          mtedit::crop_resize_cuda(in, stream, device);
        });
  m.attr("cuda_archs") = MTEDIT_CUDA_ARCHS;
  m.def("device_copy", &mtedit::device_copy, py::arg("dst"), py::arg("src"), py::arg("bytes"), py::arg("stream"),
        py::arg("device") = 0, py::call_guard<py::gil_scoped_release>());
#else
  m.attr("cuda_archs") = "";
#endif
}
