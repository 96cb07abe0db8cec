// Adds to every row of a linear's output what the row's adapter makes of the row's input:
//     y[row] += (x[row] A[slot]) B[slot]
// reading the slots' tables where they lie. It is plain C++ called through C, so that it depends on no version of torch
// or Python; docs/decisions/0012-slot-operator.md has the reasons. Rows are shared out over OpenMP's threads, whose
// library must be the one that torch has loaded already.

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))

// Of one linear; `slot_operator.py` has the same fields. Letters: S slots, width of all linears with this input.
struct Linear {
    const void* A;    // (S, width, d_in)
    const void* B;    // (S, rank, d_out), scaling folded in
    int64_t d_in;
    int64_t width;
    int64_t first;    // the linear's first one of the width
    int64_t rank;
    int64_t d_out;
    int64_t is_half;  // fp16 tables; else fp32
};

struct Half {
    uint16_t bits;
};

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define MANY_INSTRUCTION_SETS
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4,prefer-vector-width=512")
namespace avx512 {
#define VECTOR_BYTES 64
#include "slot_kernels.h"
#undef VECTOR_BYTES
}  // namespace avx512
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v3")
namespace avx2 {
#define VECTOR_BYTES 32
#include "slot_kernels.h"
#undef VECTOR_BYTES
}  // namespace avx2
#pragma GCC pop_options
#endif

namespace plain {
#define VECTOR_BYTES 16
#include "slot_kernels.h"
#undef VECTOR_BYTES
}  // namespace plain

using AddRow = void (*)(const Linear&, int64_t, int64_t, const float*, bool, float*, float*);

// The products on the named instruction set; null where it is unknown or this processor lacks it.
extern "C" AddRow mhr_find_kernel(const char* name) {
#if defined(MANY_INSTRUCTION_SETS)
    __builtin_cpu_init();
    if (strcmp(name, "avx512") == 0) return __builtin_cpu_supports("x86-64-v4") ? avx512::add_row : nullptr;
    if (strcmp(name, "avx2") == 0) return __builtin_cpu_supports("x86-64-v3") ? avx2::add_row : nullptr;
#endif
    return strcmp(name, "plain") == 0 ? plain::add_row : nullptr;
}

// Rows 0 … rows-1 of x (…, d_in) and y (…, d_out), with slots (rows,) and hidden (rows, width), which is filled unless
// it was by another linear with this input.
extern "C" void mhr_add_rows(AddRow kernel, const Linear* linear, const float* x, float* y, float* hidden,
                             int has_hidden, const int64_t* slots, int64_t rows, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t row = 0; row < rows; ++row)
        kernel(*linear, slots[row], slots[row + 1 < rows ? row + 1 : row], x + row * linear->d_in, has_hidden != 0,
               hidden + row * linear->width, y + row * linear->d_out);
}
