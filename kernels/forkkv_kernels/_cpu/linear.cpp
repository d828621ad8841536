// y = x W^T + bias in bfloat16, W packed once: panels of 64 outputs, each [in / 2][64] pairs, read from end to end.
//
// One to a few rows are bound by reading W, many by the dot products; both want W in the order in which it is used. Every
// row is summed in the same order whatever other rows there are: a token's numbers do not depend on its batch.
#include "packing.h"

#if defined(__AVX512BF16__)
namespace forkkv {
namespace {

constexpr int PANEL = 64;
constexpr int TILE_ROWS = 6;     // 6 x 4 sums, 4 vectors of W and a scalar in 32 registers
constexpr int CHUNK_ROWS = 96;   // rows that pass over a panel while it is in the second-level cache

template <int N>
void tile(const uint32_t* x, int64_t x_stride, const uint32_t* panel, int depth, const float* bias, bf16* out, int64_t out_stride,
          int width) {
    Vec sums[N][VECS];
    for (int n = 0; n < N; n++)
        for (int v = 0; v < VECS; v++) sums[n][v] = load(bias + v * LANES);
    for (int d = 0; d < depth; d++)
        for (int n = 0; n < N; n++)
            for (int v = 0; v < VECS; v++)
                sums[n][v] = Paired::multiply_add(sums[n][v], panel + d * PANEL + v * LANES, x + n * x_stride + d);
    for (int n = 0; n < N; n++)
        for (int v = 0; v < VECS && v * LANES < width; v++)
            store_some(sums[n][v], out + n * out_stride + v * LANES, width - v * LANES);
}

void pack(const bf16* weight, uint32_t* packed, int64_t out, int64_t in, int threads) {
    int64_t panels = (out + PANEL - 1) / PANEL;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t p = 0; p < panels; p++) {
        const bf16* rows[PANEL];
        int count = int(std::min<int64_t>(PANEL, out - p * PANEL));
        for (int i = 0; i < count; i++) rows[i] = weight + (p * PANEL + i) * in;
        pack_keys(rows, count, int(in), packed + p * (in / 2) * PANEL);
    }
}

void multiply(const bf16* x, const uint32_t* packed, const bf16* bias, bf16* y, int64_t rows, int64_t out, int64_t in, int threads) {
    int64_t panels = (out + PANEL - 1) / PANEL, chunks = (rows + CHUNK_ROWS - 1) / CHUNK_ROWS;
    int depth = int(in / 2);
    const uint32_t* pairs = reinterpret_cast<const uint32_t*>(x);
#pragma omp parallel for collapse(2) schedule(static) num_threads(threads)
    for (int64_t chunk = 0; chunk < chunks; chunk++) {
        for (int64_t p = 0; p < panels; p++) {
            const uint32_t* panel = packed + p * depth * PANEL;
            int width = int(std::min<int64_t>(PANEL, out - p * PANEL));
            float start[PANEL] = {};
            for (int i = 0; bias && i < width; i++) start[i] = to_float(bias[p * PANEL + i]);
            int64_t row = chunk * CHUNK_ROWS, end = std::min(row + CHUNK_ROWS, rows);
            bf16* at = y + p * PANEL;
            for (; row + TILE_ROWS <= end; row += TILE_ROWS)
                tile<TILE_ROWS>(pairs + row * depth, depth, panel, depth, start, at + row * out, out, width);
            const uint32_t* last = pairs + row * depth;
            if (end - row == 5) tile<5>(last, depth, panel, depth, start, at + row * out, out, width);
            if (end - row == 4) tile<4>(last, depth, panel, depth, start, at + row * out, out, width);
            if (end - row == 3) tile<3>(last, depth, panel, depth, start, at + row * out, out, width);
            if (end - row == 2) tile<2>(last, depth, panel, depth, start, at + row * out, out, width);
            if (end - row == 1) tile<1>(last, depth, panel, depth, start, at + row * out, out, width);
        }
    }
}

}  // namespace
}  // namespace forkkv
#endif

extern "C" {
// 0 where the processor has no bfloat16 dot product: then the other two do nothing.
int forkkv_has_linear() {
#if defined(__AVX512BF16__)
    return 1;
#else
    return 0;
#endif
}
// weight [out, in] -> packed [ceil(out / 64)][in / 2][64] pairs; in is even.
void forkkv_pack_weight([[maybe_unused]] const forkkv::bf16* weight, [[maybe_unused]] uint32_t* packed,
                        [[maybe_unused]] int64_t out, [[maybe_unused]] int64_t in, [[maybe_unused]] int threads) {
#if defined(__AVX512BF16__)
    forkkv::pack(weight, packed, out, in, threads);
#endif
}
// x [rows, in] -> y [rows, out]; bias [out] or null.
void forkkv_linear([[maybe_unused]] const forkkv::bf16* x, [[maybe_unused]] const uint32_t* packed,
                   [[maybe_unused]] const forkkv::bf16* bias, [[maybe_unused]] forkkv::bf16* y, [[maybe_unused]] int64_t rows,
                   [[maybe_unused]] int64_t out, [[maybe_unused]] int64_t in, [[maybe_unused]] int threads) {
#if defined(__AVX512BF16__)
    forkkv::multiply(x, packed, bias, y, rows, out, in, threads);
#endif
}
}
