// Vectors of 16 floats, bfloat16 by hand, and the one multiply-add that every kernel here is made of.
//
// GCC's vector extension is lowered to whatever the machine has: one AVX-512 register, two of AVX2, four of NEON. Only the
// bfloat16 dot product (AVX512_BF16, two products a lane) is spelt out, because no compiler finds it by itself.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace forkkv {

constexpr int LANES = 16;
constexpr int MAX_HEAD_DIM = 512;
typedef float Vec __attribute__((vector_size(64)));
typedef int32_t VecI __attribute__((vector_size(64)));
typedef uint32_t VecU __attribute__((vector_size(64)));
typedef uint16_t HalfVec __attribute__((vector_size(32)));

struct bf16 {
    uint16_t bits;
};

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) {
    uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

// Round to nearest, ties to even; NaN stays NaN.
inline void store(float x, float* at) { *at = x; }
inline void store(float x, bf16* at) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    at->bits = x != x ? 0x7FC0 : static_cast<uint16_t>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

inline Vec splat(float x) { return Vec{} + x; }

inline Vec load(const float* at) {
    Vec value;
    std::memcpy(&value, at, sizeof value);
    return value;
}
inline Vec load(const bf16* at) {
    HalfVec half;
    std::memcpy(&half, at, sizeof half);
    VecU wide = __builtin_convertvector(half, VecU) << 16;
    return (Vec)(wide);
}
inline void store(Vec x, float* at) { std::memcpy(at, &x, sizeof x); }
inline void store(Vec x, bf16* at) {
#if defined(__AVX512BF16__)
    __m256bh half = _mm512_cvtneps_pbh((__m512)(x));
    std::memcpy(at, &half, sizeof half);
#else
    VecU bits = (VecU)(x);
    VecU rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
    VecI is_nan = x != x;
    rounded = (rounded & ~(VecU)(is_nan)) | ((VecU)(is_nan) & 0x7FC0);
    HalfVec half = __builtin_convertvector(rounded, HalfVec);
    std::memcpy(at, &half, sizeof half);
#endif
}

template <class T>
inline Vec load_some(const T* at, int count) {
    if (count >= LANES) return load(at);
    T padded[LANES] = {};
    std::memcpy(padded, at, sizeof(T) * count);
    return load(padded);
}
template <class T>
inline void store_some(Vec x, T* at, int count) {
    if (count >= LANES) return store(x, at);
    T padded[LANES];
    store(x, padded);
    std::memcpy(at, padded, sizeof(T) * count);
}

// What a kernel of dtype T rounds to where the reference rounds in between.
template <class T>
inline Vec rounded(Vec x) {
    T stored[LANES];
    store(x, stored);
    return load(stored);
}

inline float sum(Vec x) {
    float total = 0;
    for (int i = 0; i < LANES; i++) total += x[i];
    return total;
}
inline float largest(Vec x) {
    float value = x[0];
    for (int i = 1; i < LANES; i++) value = x[i] > value ? x[i] : value;
    return value;
}
inline Vec max(Vec a, Vec b) { return a > b ? a : b; }

// 2^x to 2 units in the last place, 0 below -126: 2^n times a polynomial for 2^f, |f| <= 1/2 (Cephes exp2f). NaN stays NaN.
inline Vec exp2(Vec x) {
    x = x < splat(-150.f) ? splat(-150.f) : x;
    x = x > splat(127.f) ? splat(127.f) : x;
    Vec n = (x + 12582912.f) - 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer
    Vec f = x - n;
    Vec p = splat(1.535336188e-4f);
    p = p * f + 1.339887440e-3f;
    p = p * f + 9.618437357e-3f;
    p = p * f + 5.550332548e-2f;
    p = p * f + 2.402264791e-1f;
    p = p * f + 6.931472028e-1f;
    p = p * f + 1.f;
#if defined(__AVX512F__)
    return (Vec)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
    VecI power = (__builtin_convertvector(n, VecI) + 127) << 23;
    return n < splat(-126.f) ? splat(0.f) : p * (Vec)power;
#endif
}

constexpr float LOG2_E = 1.44269504088896341f;

// How products are packed. `Item` holds PAIR neighbours of the summed dimension; a vector is LANES items.
struct Plain {
    typedef float Item, Stored;
    static constexpr int PAIR = 1;
    static inline Vec multiply_add(Vec sum, const Item* vector, const Item* scalar) { return sum + load(vector) * *scalar; }
};
#if defined(__AVX512BF16__)
struct Paired {
    typedef uint32_t Item;
    typedef bf16 Stored;  // a row of items is a row of these
    static constexpr int PAIR = 2;
    static inline Vec multiply_add(Vec sum, const Item* vector, const Item* scalar) {
        __m512i left = _mm512_loadu_si512(vector), right = _mm512_set1_epi32(static_cast<int>(*scalar));
        __m512 result = _mm512_dpbf16_ps((__m512)(sum), (__m512bh)(left),
                                         (__m512bh)(right));
        return (Vec)(result);
    }
};
#endif

template <class T>
struct PackingOf {
    typedef Plain type;
};
#if defined(__AVX512BF16__)
template <>
struct PackingOf<bf16> {
    typedef Paired type;
};
#endif

}  // namespace forkkv
