// Four lanes: SSE2, which every x86-64 has, NEON on aarch64, or whatever the compiler makes of it.
#define BFT_ISA portable
#define BFT_ISA_NAME "portable"
#define BFT_LANES 4
#include "csrc/cpu/kernels_impl.h"
