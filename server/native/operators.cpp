// The operators that torch has not, or not as one. Plain C++ called through C, so that it depends on no version of torch
// or Python; docs/decisions/0012-compiled-operators.md has the reasons. Work is shared out over OpenMP's threads, whose
// library must be the one that torch has loaded already. All tensors are contiguous unless strides are given.

#include <omp.h>

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#endif

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
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
    int64_t column;   // where the linear's outputs begin in a row of y
    int64_t is_half;  // fp16 tables; else fp32
};

// Keys and values of one layer and the shape of a step's heads; `attention_operator.py` has the same fields.
struct Cache {
    float* keys;    // (slots, context, kv_heads, head_dim)
    float* values;  // likewise
    int64_t context;
    int64_t kv_heads;
    int64_t groups;  // query heads of one key-value head
    int64_t head_dim;
    int64_t window;  // the last tokens that a token sees
};

// Where one head's row lies: head · head_stride + row · row_stride.
struct Heads {
    const float* numbers;
    int64_t head_stride;
    int64_t row_stride;
};

struct Half {
    uint16_t bits;
};

// An 8-bit weight in the layout of tiles; `int8_product.py` has the same fields.
struct Int8Weight {
    const int8_t* pairs;     // (d_out / 32, d_in / 64, 2, 16, 16, 4), rounded up: pairs of 16 channels, 64 numbers each
    const float* scales;     // (d_out,)
    const int32_t* offsets;  // (d_out,) what the digits' own offset adds to the sums
    int64_t d_in;
    int64_t d_out;
};

// One linear of an inventory in the layout of tiles; `skill_operator.py` has the same fields.
struct SkillLinear {
    const uint16_t* A;     // (heads, skills * rank / 16, d_in / heads / 32, 16, 16, 2), rounded up
    const uint16_t* B;     // (heads, d_out / heads / 16, skills * rank / 32, 16, 16, 2), rounded up
    const float* weights;  // (heads, skills) of slot 0
    int64_t d_out;
    int64_t column;        // where the linear's outputs begin in a row of y
};

// Linears of an inventory that read the same input; `skill_operator.py` has the same fields.
struct Skills {
    const SkillLinear* linears;
    int64_t count;
    int64_t heads;
    int64_t skills;
    int64_t rank;
    int64_t d_in;
    int64_t slot_stride;  // from the weights of one slot to those of the next
    float scaling;
};

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define MANY_INSTRUCTION_SETS
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4,prefer-vector-width=512")
namespace avx512 {
#define VECTOR_BYTES 64
#include "kernels.h"
#undef VECTOR_BYTES
}  // namespace avx512
#pragma GCC pop_options
#if defined(__linux__)
#define TILES
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4,amx-tile,amx-int8,amx-bf16,avx512bf16,prefer-vector-width=512")
namespace avx512 {
#include "tile_kernels.h"
#include "skill_kernels.h"
}  // namespace avx512
#pragma GCC pop_options
#endif
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v3")
namespace avx2 {
#define VECTOR_BYTES 32
#include "kernels.h"
#undef VECTOR_BYTES
}  // namespace avx2
#pragma GCC pop_options
#endif

namespace plain {
#define VECTOR_BYTES 16
#include "kernels.h"
#undef VECTOR_BYTES
}  // namespace plain

// The kernels of one instruction set.
struct Kernels {
    decltype(&plain::add_rows) add_rows;
    decltype(&plain::attend) attend;
    decltype(&plain::quantise_row) quantise_row;
    decltype(&plain::join_row) join_row;
    decltype(&plain::norm_row) norm_row;
    decltype(&plain::rotate_row) rotate_row;
    decltype(&plain::gate_row) gate_row;
};

#define KERNELS(set)                                                   \
    {set::add_rows, set::attend,     set::quantise_row, set::join_row, \
     set::norm_row, set::rotate_row, set::gate_row}

static const Kernels plain_kernels = KERNELS(plain);
#if defined(MANY_INSTRUCTION_SETS)
static const Kernels avx2_kernels = KERNELS(avx2);
static const Kernels avx512_kernels = KERNELS(avx512);
#endif

// The kernels of the named instruction set; null where it is unknown or this processor lacks it.
extern "C" const Kernels* mhr_find_kernels(const char* name) {
#if defined(MANY_INSTRUCTION_SETS)
    __builtin_cpu_init();
    if (strcmp(name, "avx512") == 0) return __builtin_cpu_supports("x86-64-v4") ? &avx512_kernels : nullptr;
    if (strcmp(name, "avx2") == 0) return __builtin_cpu_supports("x86-64-v3") ? &avx2_kernels : nullptr;
#endif
    return strcmp(name, "plain") == 0 ? &plain_kernels : nullptr;
}

// Adds to rows 0 … rows-1 of y, `stride` numbers apart, what their adapters of `count` linears make of those of their
// input x (…, d_in):
//     y[row] += (x[row] A[slot]) B[slot], each linear from its column on,
// with slots (rows,), negative for rows to be left alone. `room` is (threads, 4, the largest rank).
extern "C" void mhr_add_rows(const Kernels* kernels, const Linear* linears, int64_t count, const float* x, float* y,
                             int64_t stride, const int64_t* slots, int64_t rows, float* room, int threads) {
    int64_t rank = 0;
    for (int64_t place = 0; place < count; ++place) rank = linears[place].rank > rank ? linears[place].rank : rank;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        const int64_t thread = omp_get_thread_num(), num_threads = omp_get_num_threads();
        const int64_t stop = rows * (thread + 1) / num_threads;
        float* own = room + thread * plain::kMostRows * rank;
        for (int64_t row = rows * thread / num_threads, next; row < stop; row = next) {
            const int64_t slot = slots[row];
            for (next = row + 1; next < stop && next < row + plain::kMostRows && slots[next] == slot;) ++next;
            if (slot < 0) continue;
            const int64_t next_slot = next < rows && slots[next] >= 0 ? slots[next] : slot;
            for (int64_t place = 0; place < count; ++place)
                kernels->add_rows(linears[place], slot, next_slot, next - row, x + row * linears[place].d_in, own,
                                  y + row * stride, stride);
        }
    }
}

// Puts the keys and values of `rows` new tokens, one of each sequence, into the cache at cache_rows (rows,) = slot ·
// context + position, and lets each token attend to its sequence up to itself: out (rows, heads, head_dim). `room` is
// (threads, 4, context and 16 more).
extern "C" void mhr_attend(const Kernels* kernels, const Cache* cache, const Heads* query, const Heads* key,
                           const Heads* value, const int64_t* cache_rows, int64_t rows, float scale, float* room,
                           float* out, int threads) {
    const int64_t head_dim = cache->head_dim, stride = cache->kv_heads * head_dim;
#pragma omp parallel for schedule(dynamic, 4) num_threads(threads) if (threads > 1)
    for (int64_t task = 0; task < rows * cache->kv_heads; ++task) {
        const int64_t row = task / cache->kv_heads, head = task % cache->kv_heads;
        const int64_t place = cache_rows[row] * stride + head * head_dim;
        const int64_t key_place = head * key->head_stride + row * key->row_stride;
        const int64_t value_place = head * value->head_stride + row * value->row_stride;
        memcpy(cache->keys + place, key->numbers + key_place, head_dim * sizeof(float));
        memcpy(cache->values + place, value->numbers + value_place, head_dim * sizeof(float));
        const int64_t seen = cache_rows[row] % cache->context + 1;
        const int64_t length = seen < cache->window ? seen : cache->window;
        const int64_t first = place - (length - 1) * stride;
        const int64_t weights_stride = cache->context + 16, heads = cache->kv_heads * cache->groups;
        float* weights = room + omp_get_thread_num() * plain::kMostRows * weights_stride;
        for (int64_t group = 0, count; group < cache->groups; group += count) {
            const int64_t left = cache->groups - group, query_head = head * cache->groups + group;
            count = left < plain::kMostRows ? left : plain::kMostRows;
            kernels->attend(count, query->numbers + query_head * query->head_stride + row * query->row_stride,
                            query->head_stride, cache->keys + first, cache->values + first, length, stride, head_dim,
                            scale, weights, weights_stride, out + (row * heads + query_head) * head_dim);
        }
    }
}

// x (rows, d) -> digits (2, rows, d) and scales (rows,); `room` is (threads, d).
extern "C" void mhr_quantise_rows(const Kernels* kernels, const float* x, int64_t rows, int64_t d, float* room,
                                  uint8_t* digits, float* scales, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t row = 0; row < rows; ++row)
        kernels->quantise_row(x + row * d, d, room + omp_get_thread_num() * d, digits + row * d,
                              digits + (rows + row) * d, scales + row);
}

// Products (2, rows, d) of both digits, and scales (rows,) -> y (rows, d).
extern "C" void mhr_join_rows(const Kernels* kernels, const float* products, const float* scales, int64_t rows, int64_t d,
                              float* y, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t row = 0; row < rows; ++row)
        kernels->join_row(products + row * d, products + (rows + row) * d, scales[row], d, y + row * d);
}

// Whether this processor has matrix tiles for 8-bit and bf16 numbers, and the operating system lets us use them: it keeps
// them for each thread, which is asked for once.
extern "C" int mhr_has_tiles() {
#if defined(TILES)
    constexpr unsigned kBf16 = 1u << 22, kTiles = 1u << 24, kInt8 = 1u << 25;
    constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM and XFEATURE_XTILEDATA
    unsigned a, b, c, d;
    if (!__builtin_cpu_supports("x86-64-v4") || !__builtin_cpu_supports("avx512bf16")) return 0;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return 0;
    return (d & kBf16) && (d & kTiles) && (d & kInt8) && syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
#else
    return 0;
#endif
}

// x (rows, d_in) -> y (rows, d_out), the product with an 8-bit weight; only where there are tiles. `digits` (2, rows, d_in),
// rounded up to whole tiles, scales (rows,) and room (threads, d_in) are to work in.
extern "C" void mhr_int8_rows(const Kernels* kernels, const Int8Weight* weight, const float* x, int64_t rows, float* y,
                              uint8_t* digits, float* scales, float* room, int threads) {
#if defined(TILES)
    using avx512::kPair, avx512::kTile, avx512::kTileBytes;
    const int64_t d_in = weight->d_in, stride = (d_in + kTileBytes - 1) / kTileBytes * kTileBytes;
    const int64_t second = (rows + kTile - 1) / kTile * kTile * stride;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
#pragma omp for schedule(static)
        for (int64_t row = 0; row < rows; ++row)
            kernels->quantise_row(x + row * d_in, d_in, room + omp_get_thread_num() * d_in, digits + row * stride,
                                  digits + second + row * stride, scales + row);
        const int64_t pairs = (weight->d_out + kPair - 1) / kPair;
        const int64_t thread = omp_get_thread_num(), num_threads = omp_get_num_threads();
        avx512::multiply_pairs(*weight, pairs * thread / num_threads, pairs * (thread + 1) / num_threads, digits,
                               scales, rows, y);
    }
#endif
}

// states (rows, d), to which more (rows, d) is added first unless it is null -> their root mean square norm (rows, d).
extern "C" void mhr_norm_rows(const Kernels* kernels, float* states, const float* more, const float* weight,
                              float epsilon, int64_t rows, int64_t d, float* normed, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t row = 0; row < rows; ++row)
        kernels->norm_row(states + row * d, more == nullptr ? nullptr : more + row * d, weight, epsilon, d,
                          normed + row * d);
}

// Rotates the first `heads` heads of the rows of x, `stride` numbers apart, with cosines and sines (rows, head_dim).
extern "C" void mhr_rotate_rows(const Kernels* kernels, float* x, int64_t stride, const float* cosines,
                                const float* sines, int64_t rows, int64_t heads, int64_t head_dim, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t row = 0; row < rows; ++row)
        kernels->rotate_row(x + row * stride, cosines + row * head_dim, sines + row * head_dim, heads, head_dim);
}

// gate and up side by side (rows, 2 d) -> silu(gate) · up (rows, d).
extern "C" void mhr_gate_rows(const Kernels* kernels, const float* gate_up, int64_t rows, int64_t d, float* out,
                              int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t row = 0; row < rows; ++row)
        kernels->gate_row(gate_up + 2 * row * d, gate_up + (2 * row + 1) * d, d, out + row * d);
}

// Adds to rows of y, `stride` numbers apart, what the mixtures of skills of their slots make of x (rows, d_in), with slots
// (rows,), negative for rows to be left alone; only where there are tiles. `room` (count, heads, 32, 16) is to work in.
extern "C" void mhr_mix_rows(const Skills* skills, const float* x, float* y, int64_t stride, const int64_t* slots,
                             int64_t rows, float* room, int threads) {
#if defined(TILES)
    const int64_t units = skills->heads * skills->count;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        const int64_t thread = omp_get_thread_num(), num_threads = omp_get_num_threads();
        const int64_t first = units * thread / num_threads, last = units * (thread + 1) / num_threads;
        avx512::open_tiles();
        for (int64_t row = 0; row < rows; row += avx512::kRowsTogether) {
            const int64_t count = rows - row < avx512::kRowsTogether ? rows - row : avx512::kRowsTogether;
            avx512::shrink_skills(*skills, first, last, x + row * skills->d_in, slots + row, count, room);
#pragma omp barrier
            avx512::expand_skills(*skills, first, last, room, slots + row, count, y + row * stride, stride);
#pragma omp barrier
        }
        avx512::close_tiles();
    }
#endif
}
