// Compiled with the AVX-512 flags of csrc/ninja_build.py on x86-64, and empty elsewhere.
#if defined(__x86_64__)
#define BFT_ISA avx512
#define BFT_ISA_NAME "avx512"
#define BFT_LANES 16
#include "csrc/cpu/kernels_impl.h"
#endif
