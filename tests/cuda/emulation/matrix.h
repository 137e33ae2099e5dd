// ldmatrix and mma.m16n8k16 for a whole warp, from the tables of the PTX ISA: sections "Warp-level
// matrix load instruction: ldmatrix" and "Matrix Fragments for mma.m16n8k16 with floating point
// type". With group = lane / 4 and member = lane % 4, element i of a lane's fragment is
//
//     A [16, 16], i < 8: row group (+ 8 if i is 2, 3, 6 or 7), column 2 member + i % 2 (+ 8 if i >
//     3) B [16, 8],  i < 4: row 2 member + i % 2 (+ 8 if i > 1), column group C, D [16, 8], i < 4:
//     row group (+ 8 if i > 1), column 2 member + i % 2
//
// A register of A or B holds elements 2r (low half) and 2r + 1.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "tests/cuda/emulation/warp.h"

namespace bft::emulation {

struct Place {
    int row, column;
};
constexpr Place a_place(int lane, int i) {
    const bool lower = i == 2 || i == 3 || i == 6 || i == 7;
    return {lane / 4 + (lower ? 8 : 0), lane % 4 * 2 + i % 2 + (i >= 4 ? 8 : 0)};
}
constexpr Place b_place(int lane, int i) {
    return {lane % 4 * 2 + i % 2 + (i >= 2 ? 8 : 0), lane / 4};
}
constexpr Place c_place(int lane, int i) {
    return {lane / 4 + (i >= 2 ? 8 : 0), lane % 4 * 2 + i % 2};
}

inline float widen(uint32_t bits, const __nv_bfloat16*) {
    return __bfloat162float(__ushort_as_bfloat16(static_cast<uint16_t>(bits)));
}
inline float widen(uint32_t bits, const __half*) {
    return __half2float(__ushort_as_half(static_cast<uint16_t>(bits)));
}

struct Multiply {
    const uint32_t *a, *b;
    const float* c;
    float* d;
};

// D = A B + C. Products are exact in float32; each element of D starts at C and adds them in the
// order of k, rounding to float32 after each. A tensor core's order and rounding are its own.
template <typename T>
void multiply(const std::array<Multiply*, 32>& lanes) {
    float a[16][16], b[16][8], d[16][8];
    for (int lane = 0; lane < 32; ++lane) {
        for (int i = 0; i < 8; ++i) {
            const Place at = a_place(lane, i);
            a[at.row][at.column] = widen(lanes[lane]->a[i / 2] >> 16 * (i % 2), (T*)nullptr);
        }
        for (int i = 0; i < 4; ++i) {
            const Place in_b = b_place(lane, i), in_c = c_place(lane, i);
            b[in_b.row][in_b.column] = widen(lanes[lane]->b[i / 2] >> 16 * (i % 2), (T*)nullptr);
            d[in_c.row][in_c.column] = lanes[lane]->c[i];
        }
    }
    for (int row = 0; row < 16; ++row) {
        for (int k = 0; k < 16; ++k) {
            for (int column = 0; column < 8; ++column) d[row][column] += a[row][k] * b[k][column];
        }
    }
    for (int lane = 0; lane < 32; ++lane) {
        for (int i = 0; i < 4; ++i) {
            const Place at = c_place(lane, i);
            lanes[lane]->d[i] = d[at.row][at.column];
        }
    }
}

struct MatrixLoad {
    int64_t offset;  // of the row that this lane addresses, in bytes
    int64_t begin, end;
    uint32_t* registers;
};

// Lane 8 m + r addresses row r of matrix m, which is 8 x 8 halves. Lane l gets elements 2 (l % 4)
// and the next of row l / 4; transposed, of column l / 4. Reading is done by the lane that gets the
// element, so a warp that wrote the rows needs a __syncwarp first: ldmatrix orders nothing.
inline void load_matrices(const std::array<MatrixLoad*, 32>& lanes, bool transposed, Site site) {
    Block& here = block();
    for (int row = 0; row < 32; ++row) {
        const MatrixLoad& load = *lanes[row];
        if (load.offset < load.begin || load.offset + 16 > load.end) {
            here.fail_lane(Kind::kOutOfBounds, row, site,
                           "ldmatrix row at shared byte " + std::to_string(load.offset) +
                               " of an array at " + std::to_string(load.begin) + " to " +
                               std::to_string(load.end));
        }
        if (load.offset % 16 != 0) {
            here.fail_lane(Kind::kMisaligned, row, site,
                           "ldmatrix row at shared byte " + std::to_string(load.offset) +
                               ", expected a multiple of 16");
        }
    }
    for (int lane = 0; lane < 32; ++lane) {
        for (int matrix = 0; matrix < 4; ++matrix) {
            uint32_t word = 0;
            for (int half = 0; half < 2; ++half) {
                const int along = lane % 4 * 2 + half, across = lane / 4;
                const int row = transposed ? along : across, column = transposed ? across : along;
                const size_t at = lanes[8 * matrix + row]->offset + 2 * column;
                here.read(lane, at, 2, site);
                uint16_t bits;
                std::memcpy(&bits, here.shared() + at, 2);
                word |= uint32_t{bits} << 16 * half;
            }
            lanes[lane]->registers[matrix] = word;
        }
    }
}

}  // namespace bft::emulation
