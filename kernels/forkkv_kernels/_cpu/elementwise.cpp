// What stands between the matrix products: norms, rotation, activation. Each rounds to T where the reference does.
#include <cmath>

#include "tables.h"
#include "vectors.h"

namespace forkkv {
namespace {

constexpr int64_t ROWS_OF_A_THREAD = 4;  // fewer rows are not worth waking a thread for

template <class T>
float inverse_rms(const T* x, int width, float eps) {
    Vec total = splat(0.f);
    for (int i = 0; i < width; i += LANES) {
        Vec value = load_some(x + i, width - i);
        total += value * value;
    }
    return 1.f / std::sqrt(sum(total) / float(width) + eps);
}

template <class T>
Vec scaled(const T* x, const T* weight, float scale, int some) {
    return rounded<T>(rounded<T>(load_some(x, some) * scale) * load_some(weight, some));
}

// hidden += delta (if any); out = rms_norm(hidden) * weight.
template <class T>
void add_rms_norm(T* hidden, const T* delta, const T* weight, T* out, int64_t num_rows, int64_t width, float eps, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (num_rows >= 2 * ROWS_OF_A_THREAD)
    for (int64_t row = 0; row < num_rows; row++) {
        T* x = hidden + row * width;
        if (delta)
            for (int i = 0; i < width; i += LANES) {
                int some = int(width - i);
                store_some(load_some(x + i, some) + load_some(delta + row * width + i, some), x + i, some);
            }
        float scale = inverse_rms(x, int(width), eps);
        for (int i = 0; i < width; i += LANES)
            store_some(scaled(x + i, weight + i, scale, int(width - i)), out + row * width + i, int(width - i));
    }
}

// gate_up [T, 2 width] -> silu(gate) * up [T, width].
template <class T>
void silu_mul(const T* gate_up, T* out, int64_t num_rows, int64_t width, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (num_rows >= ROWS_OF_A_THREAD)
    for (int64_t row = 0; row < num_rows; row++) {
        const T* gate = gate_up + row * 2 * width;
        for (int i = 0; i < width; i += LANES) {
            int some = int(width - i);
            Vec g = load_some(gate + i, some), up = load_some(gate + width + i, some);
            store_some(rounded<T>(g / (exp2(g * -LOG2_E) + 1.f)) * up, out + row * width + i, some);
        }
    }
}

template <class T>
void rotate(const T* x, const float* cos_sin, int dim, T* out) {
    int half = dim / 2;
    for (int d = 0; d < half; d += LANES) {
        int some = half - d;
        Vec cos = load_some(cos_sin + d, some), sin = load_some(cos_sin + half + d, some);
        Vec x1 = load_some(x + d, some), x2 = load_some(x + half + d, some);
        store_some(x1 * cos - x2 * sin, out + d, some);
        store_some(x2 * cos + x1 * sin, out + half + d, some);
    }
}

template <class T>
void norm_and_rotate(const T* x, const T* weight, float eps, const float* cos_sin, int dim, T* scratch, T* out) {
    if (weight) {
        float scale = inverse_rms(x, dim, eps);
        for (int d = 0; d < dim; d += LANES) store_some(scaled(x + d, weight + d, scale, dim - d), scratch + d, dim - d);
        x = scratch;
    }
    rotate(x, cos_sin, dim, out);
}

template <class T>
void rope_store(const RopeStore& s) {
    int dim = int(s.head_dim);
    int64_t kv_width = s.num_kv_heads * dim, width = (s.num_heads + 2 * s.num_kv_heads) * dim;
#pragma omp parallel for schedule(static) num_threads(int(s.num_threads)) if (s.num_rows >= 2 * ROWS_OF_A_THREAD)
    for (int64_t row = 0; row < s.num_rows; row++) {
        T scratch[MAX_HEAD_DIM];
        const T* x = static_cast<const T*>(s.qkv) + row * width;
        const float* cos_sin = s.cos_sin + row * dim;
        T* q = static_cast<T*>(s.q) + row * s.num_heads * dim;
        for (int64_t head = 0; head < s.num_heads; head++)
            norm_and_rotate(x + head * dim, static_cast<const T*>(s.q_norm), float(s.eps), cos_sin, dim, scratch, q + head * dim);
        if (s.slots[row] < 0) continue;
        const T* k = x + s.num_heads * dim;
        T* k_out = static_cast<T*>(s.k_cache) + s.slots[row] * kv_width;
        for (int64_t head = 0; head < s.num_kv_heads; head++)
            norm_and_rotate(k + head * dim, static_cast<const T*>(s.k_norm), float(s.eps), cos_sin, dim, scratch, k_out + head * dim);
        std::memcpy(static_cast<T*>(s.v_cache) + s.slots[row] * kv_width, k + kv_width, sizeof(T) * kv_width);
    }
}

}  // namespace
}  // namespace forkkv

extern "C" {
using forkkv::bf16;
void forkkv_add_rms_norm_bf16(bf16* hidden, const bf16* delta, const bf16* weight, bf16* out, int64_t rows, int64_t width,
                              float eps, int threads) {
    forkkv::add_rms_norm(hidden, delta, weight, out, rows, width, eps, threads);
}
void forkkv_add_rms_norm_f32(float* hidden, const float* delta, const float* weight, float* out, int64_t rows, int64_t width,
                             float eps, int threads) {
    forkkv::add_rms_norm(hidden, delta, weight, out, rows, width, eps, threads);
}
void forkkv_silu_mul_bf16(const bf16* gate_up, bf16* out, int64_t rows, int64_t width, int threads) {
    forkkv::silu_mul(gate_up, out, rows, width, threads);
}
void forkkv_silu_mul_f32(const float* gate_up, float* out, int64_t rows, int64_t width, int threads) {
    forkkv::silu_mul(gate_up, out, rows, width, threads);
}
void forkkv_rope_store_bf16(const forkkv::RopeStore* s) { forkkv::rope_store<bf16>(*s); }
void forkkv_rope_store_f32(const forkkv::RopeStore* s) { forkkv::rope_store<float>(*s); }
}
