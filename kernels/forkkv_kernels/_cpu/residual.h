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
        b_.resize(depth_ * width_);
        pack_values(rows.data(), factors.rank, head_dim, b_.data());
        a_.resize(BLOCK * depth_);
        sums_.resize(BLOCK * width_);
    }

    // out[key] = base[key] + ...; cos_sin [count, head_dim] or null; norm and change point at this head's column, or null.
    void build(const T* const* base, const T* const* a, int count, const float* cos_sin, const T* norm, int64_t norm_stride,
               const T* change, int64_t change_stride, const Slots& slots, int64_t first, T* out) {
        const Item* rows = a_.data();
        int row_stride = depth_;
        if (is_in_place(a, count)) {
            rows = reinterpret_cast<const Item*>(a[0]), row_stride = int(factors_.stride) / P::PAIR;
        } else {
            for (int key = 0; key < count; key++) pack_row(a[key], int(factors_.rank), a_.data() + key * depth_);
        }
        std::fill(sums_.begin(), sums_.begin() + count * width_, 0.f);
        accumulate<P>(rows, row_stride, b_.data(), width_, depth_, count, sums_.data(), width_);
        for (int key = 0; key < count; key++) {
            float n = 1.f, c = 1.f;
            if (norm) {
                int64_t slot = slots[first + key];
                n = to_float(norm[slot * norm_stride]);
                c = 1.f + to_float(change[slot * change_stride]);
            }
            if (cos_sin)
                rotate_and_add(base[key], sums_.data() + key * width_, cos_sin + key * dim_, n, c, out + key * dim_);
            else
                add(base[key], sums_.data() + key * width_, out + key * dim_);
        }
    }

   private:
    // Whether rows of a follow one another, and each is items as it lies: of an even rank, at the address of an item.
    bool is_in_place(const T* const* a, int count) const {
        if (factors_.rank % P::PAIR || factors_.stride % P::PAIR || reinterpret_cast<uintptr_t>(a[0]) % sizeof(Item)) return false;
        if (sizeof(T) * P::PAIR != sizeof(Item)) return false;
        for (int key = 1; key < count; key++)
            if (a[key] != a[key - 1] + factors_.stride) return false;
        return true;
    }

    void rotate_and_add(const T* base, const float* y, const float* cos_sin, float n, float c, T* out) {
        int half = dim_ / 2;
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
    std::vector<Item> a_, b_;
    std::vector<float> sums_;
};

}  // namespace forkkv
