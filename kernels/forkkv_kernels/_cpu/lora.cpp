// LoRA of few rows under many adapters: out += (x A) B, the shrink kept in fp32, each adapter's factors read once.
#include <vector>

#include "tables.h"
#include "vectors.h"

namespace forkkv {
namespace {

inline float dot_product(const float* a, const float* b, int count) {
    Vec total = splat(0.f);
    for (int i = 0; i < count; i += LANES) total += load_some(a + i, count - i) * load_some(b + i, count - i);
    return sum(total);
}
inline float dot_product(const bf16* a, const bf16* b, int count) {
    Vec total = splat(0.f);
    int i = 0;
#if defined(__AVX512BF16__)
    __m512 pairs = _mm512_setzero_ps();
    for (; i + 2 * LANES <= count; i += 2 * LANES)
        pairs = _mm512_dpbf16_ps(pairs, (__m512bh)_mm512_loadu_si512(a + i), (__m512bh)_mm512_loadu_si512(b + i));
    total = (Vec)pairs;
#endif
    for (; i < count; i += LANES) total += load_some(a + i, count - i) * load_some(b + i, count - i);
    return sum(total);
}

// Columns [from, from + M vectors): each row of b is read M vectors at a time, in the order in which it lies.
template <class T, int M>
void expand_columns(const T* b, int64_t width, const float* shrunk, int64_t rank, T* out) {
    Vec sums[M];
    for (int m = 0; m < M; m++) sums[m] = load(out + m * LANES);
    for (int64_t r = 0; r < rank; r++)
        for (int m = 0; m < M; m++) sums[m] += load(b + r * width + m * LANES) * shrunk[r];
    for (int m = 0; m < M; m++) store(sums[m], out + m * LANES);
}

template <class T>
void expand(const LoraPart& part, const float* shrunk, int64_t from, int64_t to, T* out) {
    int64_t width = part.out_end - part.out_begin, rank = part.rank_end - part.rank_begin;
    const T* b = static_cast<const T*>(part.b);
    T* row = out + part.out_begin;
    const float* own = shrunk + part.rank_begin;
    int64_t o = from;
    for (; o + 8 * LANES <= to; o += 8 * LANES) expand_columns<T, 8>(b + o, width, own, rank, row + o);
    for (; o + LANES <= to; o += LANES) expand_columns<T, 1>(b + o, width, own, rank, row + o);
    if (o == to) return;
    int some = int(to - o);
    Vec total = load_some(row + o, some);
    for (int64_t r = 0; r < rank; r++) total += load_some(b + r * width + o, some) * own[r];
    store_some(total, row + o, some);
}

// Asks for what a part's columns [from, to) will read, while the shrink computes.
template <class T>
void prefetch(const LoraPart& part, int64_t from, int64_t to) {
    int64_t width = part.out_end - part.out_begin;
    for (int64_t r = 0; r < part.rank_end - part.rank_begin; r++)
        for (int64_t o = from; o < to; o += 64 / int64_t(sizeof(T)))
            __builtin_prefetch(static_cast<const T*>(part.b) + r * width + o, 0, 2);
}

template <class T>
void apply(const Lora& lora) {
    int64_t num_rows = 0, widest = 0;
    for (int s = 0; s < lora.num_segments; s++) {
        num_rows += lora.segments[s].row_end - lora.segments[s].row_begin;
        widest = lora.segments[s].rank > widest ? lora.segments[s].rank : widest;
    }
    static thread_local std::vector<float> kept;
    if (kept.size() < size_t(num_rows * widest)) kept.resize(num_rows * widest);
    float* shrunk = kept.data();
    std::vector<int64_t> first(lora.num_segments, 0);
    for (int s = 1; s < lora.num_segments; s++)
        first[s] = first[s - 1] + lora.segments[s - 1].row_end - lora.segments[s - 1].row_begin;
    // Work is cut by segment and half of the outputs, so that one segment serves two threads.
    auto each_piece = [&](int64_t piece, auto work) {
        const LoraSegment& segment = lora.segments[piece / 2];
        for (int p = 0; p < segment.num_parts; p++) {
            int64_t width = segment.parts[p].out_end - segment.parts[p].out_begin, half = width / 2 / LANES * LANES;
            work(segment, segment.parts[p], piece % 2 ? half : 0, piece % 2 ? width : half);
        }
    };
#pragma omp parallel num_threads(int(lora.num_threads))
    {
#pragma omp for schedule(static) nowait
        for (int64_t piece = 0; piece < 2 * lora.num_segments; piece++)
            each_piece(piece, [](const LoraSegment&, const LoraPart& part, int64_t from, int64_t to) { prefetch<T>(part, from, to); });
#pragma omp for collapse(2) schedule(static)
        for (int64_t s = 0; s < lora.num_segments; s++) {
            for (int64_t r = 0; r < widest; r++) {
                const LoraSegment& segment = lora.segments[s];
                if (r >= segment.rank) continue;
                float one = segment.ones ? to_float(static_cast<const T*>(segment.ones)[r]) : 0.f;
                const T* a = static_cast<const T*>(segment.a) + r * lora.in;
                for (int64_t row = segment.row_begin; row < segment.row_end; row++)
                    shrunk[(first[s] + row - segment.row_begin) * widest + r] =
                        one + dot_product(static_cast<const T*>(lora.x) + row * lora.in, a, int(lora.in));
            }
        }
#pragma omp for schedule(static)
        for (int64_t piece = 0; piece < 2 * lora.num_segments; piece++) {
            each_piece(piece, [&](const LoraSegment& segment, const LoraPart& part, int64_t from, int64_t to) {
                for (int64_t row = segment.row_begin; row < segment.row_end; row++)
                    expand(part, shrunk + (first[piece / 2] + row - segment.row_begin) * widest, from, to,
                           static_cast<T*>(lora.out) + row * lora.out_stride);
            });
        }
    }
}

}  // namespace
}  // namespace forkkv

extern "C" {
void forkkv_lora_bf16(const forkkv::Lora* lora) { forkkv::apply<forkkv::bf16>(*lora); }
void forkkv_lora_f32(const forkkv::Lora* lora) { forkkv::apply<float>(*lora); }
}
