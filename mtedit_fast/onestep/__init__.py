"""One-step generators of clean images from corrupted ones: operators, networks, samplers, files, Fréchet distance."""

from mtedit_fast.onestep.corruption import FAMILIES, Corruption, Family, Stream, estimate_noise, image_seeds, register
from mtedit_fast.onestep.edm_sampler import EDMSampling, edm_sample
from mtedit_fast.onestep.fid import Features, FeatureStatistics, frechet_distance, load_features, measure
from mtedit_fast.onestep.generator import ImageSource, OneStepGenerator, TeacherSampler, seen_by, to_uint8
from mtedit_fast.onestep.operators import (
    Blur,
    Composition,
    Inpainting,
    MultiCoilMRI,
    Operator,
    PartialFourier,
    SuperResolution,
)
from mtedit_fast.onestep.precondition import (
    EDMDenoiser,
    load_denoiser,
    loss_weight,
    new_unet,
    preconditioning,
    save_denoiser,
)
from mtedit_fast.onestep.writers import ImageWriter, open_writer

__all__ = [
    "FAMILIES",
    "Blur",
    "Composition",
    "Corruption",
    "EDMDenoiser",
    "EDMSampling",
    "Family",
    "FeatureStatistics",
    "Features",
    "ImageSource",
    "ImageWriter",
    "Inpainting",
    "MultiCoilMRI",
    "OneStepGenerator",
    "Operator",
    "PartialFourier",
    "Stream",
    "SuperResolution",
    "TeacherSampler",
    "edm_sample",
    "estimate_noise",
    "frechet_distance",
    "image_seeds",
    "load_denoiser",
    "load_features",
    "loss_weight",
    "measure",
    "new_unet",
    "open_writer",
    "preconditioning",
    "register",
    "save_denoiser",
    "seen_by",
    "to_uint8",
]
