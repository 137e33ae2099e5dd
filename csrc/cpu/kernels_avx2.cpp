// Compiled with -mavx2 -mfma on x86-64 (csrc/ninja_build.py), and empty elsewhere.
#if defined(__x86_64__)
#define BFT_ISA avx2
#define BFT_ISA_NAME "avx2"
#define BFT_LANES 8
#include "csrc/cpu/kernels_impl.h"
#endif
