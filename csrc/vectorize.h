// One binary for every x86-64: loops are compiled for SSE2, AVX2 and AVX-512, and chosen when the module loads
// (MTEDIT_BASELINE: SSE2 only). With -ffp-contract=off and explicit accumulator lanes the three give the same bits.
#pragma once

#if !defined(MTEDIT_BASELINE) && defined(__x86_64__) && defined(__gnu_linux__) && \
    (defined(__clang__) ? __clang_major__ >= 14 : __GNUC__ >= 8)
#define MTEDIT_VECTORIZE __attribute__((target_clones("arch=skylake-avx512", "avx2", "default")))
#else
#define MTEDIT_VECTORIZE
#endif
