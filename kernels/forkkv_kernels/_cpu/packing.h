// Rows, keys and values in the order in which the two products read them, and the two products.
//
//   dot:         scores [n, BLOCK] = rows [n, depth] . keys [BLOCK, depth]      keys packed by depth, lanes are keys
//   accumulate:  sums [n, width]  += weights [n, count] . values [count, width] values packed by count, lanes are columns
//
// An item holds P::PAIR neighbours of the summed dimension (``vectors.h``); an odd last one is paired with zero.
#pragma once

#include <algorithm>
#include <memory>
#include <vector>

#include "vectors.h"

namespace forkkv {

constexpr int BLOCK = 64;  // keys of a block: K and V of one head are 8 KiB each in bf16, within the first-level cache
constexpr int VECS = BLOCK / LANES;
constexpr int ROWS = 4;  // rows of a product: with 4 vectors each, 16 sums, 4 vectors and a scalar fit 32 registers

// Memory that is kept from call to call and never cleared: a vector would write zeros into what is overwritten next.
template <class T>
class Buffer {
   public:
    T* at_least(size_t size) {
        if (size > size_) data_.reset(new T[size]), size_ = size;
        return data_.get();
    }

   private:
    std::unique_ptr<T[]> data_;
    size_t size_ = 0;
};

template <class P>
constexpr int items(int depth) {
    return (depth + P::PAIR - 1) / P::PAIR;
}
constexpr int whole_lanes(int width) { return (width + LANES - 1) / LANES * LANES; }

template <class T>
inline void pack_row(const T* row, int depth, float* out) {
    for (int d = 0; d < depth; d++) out[d] = to_float(row[d]);
}
inline void pack_row(const bf16* row, int depth, uint32_t* out) {
    out[(depth - 1) / 2] = 0;
    std::memcpy(out, row, sizeof(bf16) * depth);
}

// One of the four butterflies of a transpose: swaps the off-diagonal halves of every 2 BIT x 2 BIT square.
template <int BIT>
inline void exchange(VecU* rows) {
    const VecI lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const VecI is_high = (lane & BIT) != 0;
    const VecU low = (VecU)(is_high ? lane - BIT + LANES : lane), high = (VecU)(is_high ? lane + LANES : lane + BIT);
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) {
        if (i & BIT) continue;
        VecU a = rows[i], b = rows[i + BIT];
        rows[i] = __builtin_shuffle(a, b, low);
        rows[i + BIT] = __builtin_shuffle(a, b, high);
    }
}

// Words [16][16] -> transposed, in place.
inline void transpose(VecU* rows) {
    exchange<1>(rows);
    exchange<2>(rows);
    exchange<4>(rows);
    exchange<8>(rows);
}

// Rows of `words` 32-bit words each -> out [words][BLOCK]; lanes from `count` on are zero.
inline void transpose_block(const void* const* rows, int count, int words, uint32_t* out) {
    for (int first = 0; first < BLOCK; first += LANES) {
        for (int word = 0; word < words; word += LANES) {
            VecU tile[LANES];
            int width = std::min(LANES, words - word);
            if (count - first >= LANES && width == LANES) {
#pragma GCC unroll 16
                for (int i = 0; i < LANES; i++)
                    std::memcpy(&tile[i], static_cast<const uint32_t*>(rows[first + i]) + word, sizeof(VecU));
            } else {
                for (int i = 0; i < LANES; i++) {
                    tile[i] = VecU{};
                    if (first + i < count) std::memcpy(&tile[i], static_cast<const uint32_t*>(rows[first + i]) + word, 4 * width);
                }
            }
            transpose(tile);
#pragma GCC unroll 16
            for (int i = 0; i < LANES; i++)
                if (i < width) std::memcpy(out + (word + i) * BLOCK + first, &tile[i], sizeof(VecU));
        }
    }
}

// K of a block: rows [count] of `depth` elements -> out [items(depth)][BLOCK]. Depth is even.
inline void pack_keys(const float* const* rows, int count, int depth, float* out) {
    transpose_block(reinterpret_cast<const void* const*>(rows), count, depth, reinterpret_cast<uint32_t*>(out));
}
inline void pack_keys(const bf16* const* rows, int count, int depth, uint32_t* out) {
    transpose_block(reinterpret_cast<const void* const*>(rows), count, depth / 2, out);
}
inline void pack_keys(const bf16* const* rows, int count, int depth, float* out) {
    for (int key = 0; key < BLOCK; key++)
        for (int d = 0; d < depth; d++) out[d * BLOCK + key] = key < count ? to_float(rows[key][d]) : 0.f;
}

// V of a block: rows [count] of `width` elements -> out [items(count)][whole_lanes(width)].
template <class T>
inline void pack_values(const T* const* rows, int count, int width, float* out) {
    for (int key = 0; key < count; key++)
        for (int d = 0; d < width; d += LANES) store(load_some(rows[key] + d, width - d), out + key * whole_lanes(width) + d);
}
inline void pack_values(const bf16* const* rows, int count, int width, uint32_t* out) {
    for (int key = 0; key < count; key += 2) {
        for (int d = 0; d < width; d += LANES) {
            Vec even = load_some(rows[key] + d, width - d);
            Vec odd = key + 1 < count ? load_some(rows[key + 1] + d, width - d) : splat(0.f);
            VecU pair = ((VecU)(even) >> 16) | (VecU)(odd);
            std::memcpy(out + key / 2 * whole_lanes(width) + d, &pair, sizeof pair);
        }
    }
}

template <class P, int N>
inline void dot_rows(const typename P::Item* rows, int row_stride, const typename P::Item* keys, int depth, float* scores,
                     int score_stride) {
    Vec sums[N][VECS] = {};
    for (int d = 0; d < depth; d++)
        for (int n = 0; n < N; n++)
            for (int v = 0; v < VECS; v++)
                sums[n][v] = P::multiply_add(sums[n][v], keys + d * BLOCK + v * LANES, rows + n * row_stride + d);
    for (int n = 0; n < N; n++)
        for (int v = 0; v < VECS; v++) store(sums[n][v], scores + n * score_stride + v * LANES);
}

// scores [num_rows, BLOCK of score_stride] from rows [num_rows, row_stride] and keys [depth][BLOCK], depth counted in items.
template <class P>
inline void dot(const typename P::Item* rows, int row_stride, const typename P::Item* keys, int depth, int num_rows,
                float* scores, int score_stride) {
    int n = 0;
    for (; n + ROWS <= num_rows; n += ROWS)
        dot_rows<P, ROWS>(rows + n * row_stride, row_stride, keys, depth, scores + n * score_stride,
                          score_stride);
    rows += n * row_stride, scores += n * score_stride;
    if (num_rows - n == 3) dot_rows<P, 3>(rows, row_stride, keys, depth, scores, score_stride);
    if (num_rows - n == 2) dot_rows<P, 2>(rows, row_stride, keys, depth, scores, score_stride);
    if (num_rows - n == 1) dot_rows<P, 1>(rows, row_stride, keys, depth, scores, score_stride);
}

template <class P, int N, int M>
inline void accumulate_rows(const typename P::Item* weights, int weight_stride, const typename P::Item* values,
                            int value_stride, int count, float* sums, int sum_stride) {
    Vec held[N][M];
    for (int n = 0; n < N; n++)
        for (int m = 0; m < M; m++) held[n][m] = load(sums + n * sum_stride + m * LANES);
    for (int i = 0; i < count; i++)
        for (int n = 0; n < N; n++)
            for (int m = 0; m < M; m++)
                held[n][m] = P::multiply_add(held[n][m], values + i * value_stride + m * LANES, weights + n * weight_stride + i);
    for (int n = 0; n < N; n++)
        for (int m = 0; m < M; m++) store(held[n][m], sums + n * sum_stride + m * LANES);
}

template <class P, int N>
inline void accumulate_width(const typename P::Item* weights, int weight_stride, const typename P::Item* values, int width,
                             int count, float* sums, int sum_stride) {
    int d = 0;
    for (; d + 4 * LANES <= width; d += 4 * LANES)
        accumulate_rows<P, N, 4>(weights, weight_stride, values + d, width, count, sums + d, sum_stride);
    values += d, sums += d;
    if (width - d == 3 * LANES) accumulate_rows<P, N, 3>(weights, weight_stride, values, width, count, sums, sum_stride);
    if (width - d == 2 * LANES) accumulate_rows<P, N, 2>(weights, weight_stride, values, width, count, sums, sum_stride);
    if (width - d == LANES) accumulate_rows<P, N, 1>(weights, weight_stride, values, width, count, sums, sum_stride);
}

// sums [num_rows, width of sum_stride] += weights [num_rows, weight_stride] . values [count][width]; width in whole lanes, count in items.
template <class P>
inline void accumulate(const typename P::Item* weights, int weight_stride, const typename P::Item* values, int width,
                       int count, int num_rows, float* sums, int sum_stride) {
    int n = 0;
    for (; n + ROWS <= num_rows; n += ROWS)
        accumulate_width<P, ROWS>(weights + n * weight_stride, weight_stride, values, width, count,
                                  sums + n * sum_stride, sum_stride);
    weights += n * weight_stride, sums += n * sum_stride;
    if (num_rows - n == 3) accumulate_width<P, 3>(weights, weight_stride, values, width, count, sums, sum_stride);
    if (num_rows - n == 2) accumulate_width<P, 2>(weights, weight_stride, values, width, count, sums, sum_stride);
    if (num_rows - n == 1) accumulate_width<P, 1>(weights, weight_stride, values, width, count, sums, sum_stride);
}

}  // namespace forkkv
