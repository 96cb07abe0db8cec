// Vectors of numbers, as wide as VECTOR_BYTES. This file and those with the kernels are included once per instruction
// set, inside a namespace of its own.

typedef float Floats __attribute__((vector_size(VECTOR_BYTES)));
typedef int32_t Integers __attribute__((vector_size(VECTOR_BYTES)));
typedef uint32_t Words __attribute__((vector_size(VECTOR_BYTES)));
typedef uint16_t Shorts __attribute__((vector_size(VECTOR_BYTES / 2)));

constexpr int64_t kLanes = VECTOR_BYTES / sizeof(float);

INLINE Floats load(const float* values) {
    Floats loaded;
    memcpy(&loaded, values, sizeof loaded);
    return loaded;
}

// Exact for every fp16 number. Its exponent and digits, taken for those of an fp32 number, are off by 2^112.
INLINE Floats widen(Shorts halves) {
    const Words bits = __builtin_convertvector(halves, Words);
    const Words magnitude = (bits & 0x7fff) << 13;
    Floats scaled;
    memcpy(&scaled, &magnitude, sizeof scaled);
    scaled *= 0x1p112f;
    Words finite;
    memcpy(&finite, &scaled, sizeof finite);
    const Words not_finite = (Words)(magnitude >= 0x0f800000);
    const Words widened = (finite | (not_finite & 0x7f800000)) | ((bits & 0x8000) << 16);
    Floats values;
    memcpy(&values, &widened, sizeof values);
    return values;
}

INLINE Floats load(const Half* values) {
#if VECTOR_BYTES == 64
    return (Floats)_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values)));
#elif VECTOR_BYTES == 32
    return (Floats)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(values)));
#else
    Shorts halves;
    memcpy(&halves, values, sizeof halves);
    return widen(halves);
#endif
}

// The first `count` values, and zeros behind them.
template <class Number>
INLINE Floats load_part(const Number* values, int64_t count) {
    Number part[kLanes] = {};
    memcpy(part, values, count * sizeof(Number));
    return load(part);
}

// The sum of the two halves of a vector.
template <class Half, class Whole>
INLINE Half fold(Whole values) {
    static_assert(2 * sizeof(Half) == sizeof(Whole));
    Half low, high;
    memcpy(&low, &values, sizeof low);
    memcpy(&high, reinterpret_cast<const char*>(&values) + sizeof low, sizeof high);
    return low + high;
}

INLINE float total(Floats values) {
    typedef float Four __attribute__((vector_size(16)));
    typedef float Two __attribute__((vector_size(8)));
#if VECTOR_BYTES == 64
    typedef float Eight __attribute__((vector_size(32)));
    const Four four = fold<Four>(fold<Eight>(values));
#elif VECTOR_BYTES == 32
    const Four four = fold<Four>(values);
#else
    const Four four = values;
#endif
    const Two two = fold<Two>(four);
    return two[0] + two[1];
}
