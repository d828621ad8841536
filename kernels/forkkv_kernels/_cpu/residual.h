// K or V of a block with its low-rank residual, row by row: base + R(a B), or (1 + c) base + n R(a B) with QK-norm.
#pragma once

#include "packing.h"
#include "tables.h"

namespace forkkv {

template <class T>
struct ResidualBlock {
    typedef typename PackingOf<T>::type P;
    typedef typename P::Item Item;

    ResidualBlock(const Factors& factors, int num_kv_heads, int head_dim, int head)
        : factors_(factors), dim_(head_dim), width_(whole_lanes(head_dim)), depth_(items<P>(factors.rank)) {
        std::vector<const T*> rows(factors.rank);
        for (int r = 0; r < factors.rank; r++)
            rows[r] = static_cast<const T*>(factors.b) + (int64_t(r) * num_kv_heads + head) * head_dim;
        b_ = kept_.b.at_least(depth_ * width_);
        pack_values(rows.data(), int(factors.rank), head_dim, b_);
    }

    // out[key] = base[key] + ...; cos_sin [count, head_dim] or null; norm and change point at this head's column, or null.
    void build(const T* const* base, const T* const* a, int count, const float* cos_sin, const T* norm, int64_t norm_stride,
               const T* change, int64_t change_stride, const Slots& slots, int64_t first, T* out) {
        Item* packed = kept_.a.at_least(BLOCK * depth_);
        const Item* rows = packed;
        int row_stride = depth_;
        if (is_in_place(a, count)) {
            rows = reinterpret_cast<const Item*>(a[0]), row_stride = int(factors_.stride) / P::PAIR;
        } else {
            for (int key = 0; key < count; key++) pack_row(a[key], int(factors_.rank), packed + key * depth_);
        }
        for (int key = 0; key < count; key++) {
            norm_[key] = norm ? to_float(norm[slots[first + key] * norm_stride]) : 1.f;
            change_[key] = norm ? 1.f + to_float(change[slots[first + key] * change_stride]) : 1.f;
        }
        switch (dim_) {
            case 32: return build_all<8, 2>(base, rows, row_stride, count, cos_sin, out);
            case 64: return build_all<4, 4>(base, rows, row_stride, count, cos_sin, out);
            case 96: return build_all<3, 6>(base, rows, row_stride, count, cos_sin, out);
            case 128: return build_all<2, 8>(base, rows, row_stride, count, cos_sin, out);
        }
        float* sums = kept_.sums.at_least(BLOCK * width_);
        std::fill(sums, sums + count * width_, 0.f);
        accumulate<P>(rows, row_stride, b_, width_, depth_, count, sums, width_);
        for (int key = 0; key < count; key++) {
            if (cos_sin)
                rotate_and_add(base[key], sums + key * width_, cos_sin + key * dim_, key, out + key * dim_);
            else
                add(base[key], sums + key * width_, out + key * dim_);
        }
    }

   private:
    // N keys of M vectors at a time, from a B to what is stored without leaving the registers.
    template <int N, int M>
    void build_all(const T* const* base, const Item* a, int a_stride, int count, const float* cos_sin, T* out) {
        int key = 0;
        for (; key + N <= count; key += N) build_some<N, M>(base, a, a_stride, key, cos_sin, out);
        for (; key < count; key++) build_some<1, M>(base, a, a_stride, key, cos_sin, out);
    }

    template <int N, int M>
    void build_some(const T* const* base, const Item* a, int a_stride, int first, const float* cos_sin, T* out) {
        constexpr int WIDTH = M * LANES, HALF = WIDTH / 2;
        Vec y[N][M] = {};
        for (int d = 0; d < depth_; d++)
            for (int n = 0; n < N; n++)
                for (int m = 0; m < M; m++)
                    y[n][m] = P::multiply_add(y[n][m], b_ + d * WIDTH + m * LANES, a + (first + n) * a_stride + d);
        for (int n = 0; n < N; n++) {
            int key = first + n;
            T* row = out + key * WIDTH;
            if (!cos_sin) {
                for (int m = 0; m < M; m++) store(load(base[key] + m * LANES) + y[n][m], row + m * LANES);
                continue;
            }
            const float* table = cos_sin + key * WIDTH;
            for (int m = 0; m < M / 2; m++) {
                Vec cos = load(table + m * LANES), sin = load(table + HALF + m * LANES);
                Vec y1 = y[n][m], y2 = y[n][m + M / 2];
                const T *low = base[key] + m * LANES, *high = low + HALF;
                store(load(low) * change_[key] + (y1 * cos - y2 * sin) * norm_[key], row + m * LANES);
                store(load(high) * change_[key] + (y2 * cos + y1 * sin) * norm_[key], row + HALF + m * LANES);
            }
        }
    }

    // Whether rows of a follow one another, and each is items as it lies: of an even rank, at the address of an item.
    bool is_in_place(const T* const* a, int count) const {
        if (factors_.rank % P::PAIR || factors_.stride % P::PAIR || reinterpret_cast<uintptr_t>(a[0]) % sizeof(Item)) return false;
        if (sizeof(T) * P::PAIR != sizeof(Item)) return false;
        for (int key = 1; key < count; key++)
            if (a[key] != a[key - 1] + factors_.stride) return false;
        return true;
    }

    void rotate_and_add(const T* base, const float* y, const float* cos_sin, int key, T* out) {
        int half = dim_ / 2;
        float n = norm_[key], c = change_[key];
        for (int d = 0; d < half; d += LANES) {
            int some = half - d;
            Vec cos = load_some(cos_sin + d, some), sin = load_some(cos_sin + half + d, some);
            Vec y1 = load_some(y + d, some), y2 = load_some(y + half + d, some);
            store_some(load_some(base + d, some) * c + (y1 * cos - y2 * sin) * n, out + d, some);
            store_some(load_some(base + half + d, some) * c + (y2 * cos + y1 * sin) * n, out + half + d, some);
        }
    }
    void add(const T* base, const float* y, T* out) {
        for (int d = 0; d < dim_; d += LANES)
            store_some(load_some(base + d, dim_ - d) + load_some(y + d, dim_ - d), out + d, dim_ - d);
    }

    Factors factors_;
    int dim_, width_, depth_;
    struct Kept {
        Buffer<Item> a, b;
        Buffer<float> sums;
    };
    static inline thread_local Kept kept_;  // one block of residuals is built at a time on a thread
    Item* b_;
    float norm_[BLOCK], change_[BLOCK];  // n and 1 + c of a block's keys
};

}  // namespace forkkv
