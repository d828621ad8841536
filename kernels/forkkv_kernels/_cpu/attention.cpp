// Decode: few rows of many agents against tiles of paged keys, each tile read once for all of its rows.
//
// A unit is (tile, up to UNIT keys of it, kv head), cut at positions that UNIT divides, with a softmax of its own; units of different keys run in parallel. Their
// maxima, sums and outputs are merged row by row at the end. V's residual stays low-rank: P V = P Vb + (P a_v) B_v, with one
// product by B_v for each row and head at the very end. K is read where the adapter's whole K is at hand, else built block by
// block, once for all rows of its adapter.
#include <cmath>
#include <limits>

#include "residual.h"

namespace forkkv {
namespace {

constexpr int UNIT = 256;
constexpr float HIDDEN = -std::numeric_limits<float>::infinity();

// Whether packed K is as large as K. Where it is larger (bf16 without its dot product), whole K stays rows of elements.
template <class T>
constexpr bool is_packed_in_place = sizeof(typename PackingOf<T>::type::Item) == sizeof(T) * PackingOf<T>::type::PAIR;

struct Unit {
    const Tile* tile;
    int first_key, num_keys, head;
    float* result;  // rows * group entries of [max, sum, recalled, output]
};

struct Shape {
    int num_kv_heads, group, dim, width;
    int64_t slot_stride() const { return int64_t(num_kv_heads) * dim; }
};

int recalled_width(const Tile& tile) {
    int64_t rank = 0;
    for (int i = 0; i < tile.num_residuals; i++) rank = std::max(rank, tile.residuals[i].v.rank);
    return whole_lanes(int(rank));
}
bool has_own_k(const Residual& residual) { return residual.merged_k || residual.k.rank; }

// One unit: scores of all its keys, one softmax over them, then what the weights recall.
template <class T>
class UnitRun {
    typedef typename PackingOf<T>::type P;
    typedef typename P::Item Item;
    static constexpr int WEIGHTS = UNIT / P::PAIR;  // items of a row of weights
    static constexpr int SCORES = BLOCK + UNIT;     // of a row; the first block may begin before the unit does

   public:
    // `recalled_values`: a_v of the unit's keys by residual, as `pack_recalled` packs them.
    UnitRun(const Decode& decode, const Shape& shape, const Unit& unit, const Item* recalled_values)
        : decode_(decode), shape_(shape), unit_(unit), tile_(*unit.tile), num_rows_(int(tile_.num_rows) * shape.group),
          depth_(items<P>(shape.dim)), recalled_(recalled_width(tile_)), recalled_values_(recalled_values) {
        q_ = kept_.q.at_least(num_rows_ * depth_);
        keys_ = kept_.keys.at_least(depth_ * BLOCK);
        values_ = kept_.values.at_least(items<P>(BLOCK) * std::max(shape.width, recalled_));
        scores_ = kept_.scores.at_least(num_rows_ * SCORES);
        weights_ = kept_.weights.at_least(num_rows_ * WEIGHTS);
        built_ = kept_.built.at_least(BLOCK * shape.dim);
        max_ = unit.result, sum_ = max_ + num_rows_, recall_ = sum_ + num_rows_, out_ = recall_ + num_rows_ * recalled_;
        std::fill(recall_, out_ + num_rows_ * shape.width, 0.f);
    }

    void run() {
        pack_queries();
        int from = 0;
        for (int i = 0; i < tile_.num_residuals; i++) {
            const Residual& residual = tile_.residuals[i];
            if (!has_own_k(residual)) continue;
            score_base(from, int(residual.row_begin) * shape_.group);
            from = int(residual.row_end) * shape_.group;
            score_own(residual, int(residual.row_begin) * shape_.group, from);
        }
        score_base(from, num_rows_);
        for (int row = 0; row < num_rows_; row++) weigh(row);
        recall_base();
        for (int i = 0; i < tile_.num_residuals; i++)
            if (tile_.residuals[i].v.rank) recall(tile_.residuals[i], recalled_values_ + i * WEIGHTS * recalled_);
    }

    // a_v of the unit's keys, for all heads: [residual][items(UNIT)][recalled width].
    void pack_recalled(Item* out) {
        for (int i = 0; i < tile_.num_residuals; i++) {
            const Residual& residual = tile_.residuals[i];
            int width = whole_lanes(int(residual.v.rank)), done = 0;
            if (!width) continue;
            each_block_of_weights([&](int key, int count) {
                const T* rows[BLOCK];
                factor_rows(residual.v, residual.slots, key, count, rows);
                pack_values(rows, count, int(residual.v.rank), out + i * WEIGHTS * recalled_ + done * width);
                done += items<P>(count);
            });
        }
    }
    size_t recalled_size() const { return size_t(tile_.num_residuals) * WEIGHTS * recalled_; }

   private:
    void pack_queries() {
        const T* q = static_cast<const T*>(decode_.q);
        for (int row = 0; row < num_rows_; row++) {
            int64_t token = decode_.rows[tile_.rows[row / shape_.group]];
            int64_t head = int64_t(unit_.head) * shape_.group + row % shape_.group;
            pack_row(q + (token * shape_.num_kv_heads * shape_.group + head) * shape_.dim, shape_.dim, q_ + row * depth_);
        }
    }

    // Calls work(first key of the unit's block, number of keys) block by block, cut at positions that BLOCK divides.
    template <class F>
    void each_block(F work) {
        for (int key = 0, next; key < unit_.num_keys; key = next) {
            next = std::min(unit_.num_keys, key + BLOCK - lane(key));
            work(key, next - key);
        }
    }
    // The same from the unit's first key on: weights are packed in pairs from there, so that no block may begin within one.
    template <class F>
    void each_block_of_weights(F work) {
        for (int key = 0; key < unit_.num_keys; key += BLOCK) work(key, std::min(BLOCK, unit_.num_keys - key));
    }
    // Place of a key in its block.
    int lane(int key) const { return int((tile_.first_position + unit_.first_key + key) % BLOCK); }

    void base_rows(const void* pool, int key, int count, const T** rows) const {
        const T* start = static_cast<const T*>(pool) + unit_.head * shape_.dim;
        for (int i = 0; i < count; i++) rows[i] = start + tile_.slots[unit_.first_key + key + i] * shape_.slot_stride();
    }
    void factor_rows(const Factors& factors, const Slots& slots, int key, int count, const T** rows) const {
        const T* start = static_cast<const T*>(factors.a);
        for (int i = 0; i < count; i++) rows[i] = start + slots[unit_.first_key + key + i] * factors.stride;
    }

    void score(const T* const* keys, int key, int count, int from, int to) {
        pack_keys(keys, count, shape_.dim, keys_);
        score_packed(keys_, key, from, to);
    }
    void score_packed(const Item* keys, int key, int from, int to) {
        dot<P>(q_ + from * depth_, depth_, keys, depth_, to - from, scores_ + from * SCORES + BLOCK + key, SCORES);
    }

    void score_base(int from, int to) {
        if (from == to) return;
        each_block([&](int key, int count) {
            const T* rows[BLOCK];
            base_rows(decode_.base_k, key, count, rows);
            score(rows, key, count, from, to);
        });
    }

    // Against the adapter's own K: read where it is at hand, built from base K and the residual where not.
    void score_own(const Residual& residual, int from, int to) {
        if (!residual.merged_k) return score_built(residual, from, to);
        if (!is_packed_in_place<T>) return score_rows(residual, from, to);
        const Item* merged = static_cast<const Item*>(residual.merged_k) + unit_.head * residual.merged_stride / P::PAIR;
        each_block([&](int key, int) {
            int64_t position = tile_.first_position + unit_.first_key + key, size = int64_t(depth_) * BLOCK;
            const Item* block = merged + position / BLOCK * size;
            const Item* later = block + UNIT / BLOCK * size;  // of the next unit; one block ahead comes too late
            for (int64_t i = 0; i < size; i += 64 / int(sizeof(Item))) __builtin_prefetch(later + i, 0, 2);
            // Scores of keys before the first one of the unit are written, too: into room that nobody reads.
            score_packed(block, key - lane(key), from, to);
        });
    }

    void score_rows(const Residual& residual, int from, int to) {
        const T* merged = static_cast<const T*>(residual.merged_k) + unit_.head * residual.merged_stride;
        each_block([&](int key, int count) {
            const T* rows[BLOCK];
            for (int i = 0; i < count; i++)
                rows[i] = merged + (tile_.first_position + unit_.first_key + key + i) * shape_.dim;
            score(rows, key, count, from, to);
        });
    }

    void score_built(const Residual& residual, int from, int to) {
        ResidualBlock<T> builder(residual.k, shape_.num_kv_heads, shape_.dim, unit_.head);
        const T* norm = residual.norm ? static_cast<const T*>(residual.norm) + unit_.head : nullptr;
        const T* change = residual.change ? static_cast<const T*>(residual.change) + unit_.head : nullptr;
        each_block([&](int key, int count) {
            const T *base[BLOCK], *a[BLOCK], *rows[BLOCK];
            base_rows(decode_.base_k, key, count, base);
            factor_rows(residual.k, residual.slots, key, count, a);
            int first = unit_.first_key + key;
            builder.build(base, a, count, decode_.cos_sin + (tile_.first_position + first) * shape_.dim, norm, residual.k.stride,
                          change, residual.change_stride, residual.slots, first, built_);
            for (int i = 0; i < count; i++) rows[i] = built_ + i * shape_.dim;
            score(rows, key, count, from, to);
        });
    }

    // Softmax of one row over the unit, to base 2.
    void weigh(int row) {
        float* scores = scores_ + row * SCORES + BLOCK;
        int seen = unit_.num_keys;
        if (tile_.limits) seen = int(std::clamp<int64_t>(tile_.limits[row / shape_.group] - unit_.first_key, 0, seen));
        Item* weights = weights_ + row * WEIGHTS;
        int padded = (unit_.num_keys + BLOCK - 1) / BLOCK * BLOCK;
        for (int key = seen; key < padded; key++) scores[key] = HIDDEN;
        Vec top = splat(HIDDEN);
        for (int key = 0; key < padded; key += LANES) top = max(load(scores + key), top);
        float scale = LOG2_E / std::sqrt(float(shape_.dim));
        float highest = seen ? largest(top) * scale : 0.f;
        Vec total = splat(0.f);
        for (int key = 0; key < padded; key += LANES) {
            Vec weight = exp2(load(scores + key) * scale - highest);
            total += weight;
            store(weight, reinterpret_cast<Stored*>(weights) + key);
        }
        max_[row] = seen ? highest : HIDDEN;
        sum_[row] = sum(total);
    }

    void recall_base() {
        each_block_of_weights([&](int key, int count) {
            const T* rows[BLOCK];
            base_rows(decode_.base_v, key, count, rows);
            pack_values(rows, count, shape_.dim, values_);
            accumulate<P>(weights_ + key / P::PAIR, WEIGHTS, values_, shape_.width, items<P>(count), num_rows_, out_,
                          shape_.width);
        });
    }

    // P a_v of the adapter's rows.
    void recall(const Residual& residual, const Item* values) {
        int width = whole_lanes(int(residual.v.rank)), from = int(residual.row_begin) * shape_.group;
        int num_rows = int(residual.row_end) * shape_.group - from;
        each_block_of_weights([&](int key, int count) {
            accumulate<P>(weights_ + from * WEIGHTS + key / P::PAIR, WEIGHTS, values, width, items<P>(count), num_rows,
                          recall_ + from * recalled_, recalled_);
            values += items<P>(count) * width;
        });
    }

    typedef typename P::Stored Stored;
    const Decode& decode_;
    const Shape& shape_;
    const Unit& unit_;
    const Tile& tile_;
    int num_rows_, depth_, recalled_;
    const Item* recalled_values_;
    struct Kept {
        Buffer<Item> q, keys, values, weights;
        Buffer<T> built;
        Buffer<float> scores;
    };
    static inline thread_local Kept kept_;  // one unit runs at a time on a thread
    Item *q_, *keys_, *values_, *weights_;
    T* built_;
    float* scores_;
    float *max_, *sum_, *recall_, *out_;
};

// The units of all heads over the same keys. One head of consecutive tokens is a stride through memory, at which it is read
// half as fast as in order: what all heads will need is asked for first.
template <class T>
void run_heads(const Decode& decode, const Shape& shape, const Unit* units) {
    const Tile& tile = *units->tile;
    bool reads_base_k = tile.num_residuals == 0;
    for (int i = 0; i < tile.num_residuals; i++) reads_base_k |= !tile.residuals[i].merged_k;
    for (int key = units->first_key; key < units->first_key + units->num_keys; key++) {
        int64_t at = tile.slots[key] * shape.slot_stride();
        for (int64_t d = 0; d < shape.slot_stride(); d += 64 / int(sizeof(T))) {
            if (reads_base_k) __builtin_prefetch(static_cast<const T*>(decode.base_k) + at + d, 0, 2);
            __builtin_prefetch(static_cast<const T*>(decode.base_v) + at + d, 0, 2);
        }
    }
    typedef typename PackingOf<T>::type::Item Item;
    static thread_local Buffer<Item> kept;
    UnitRun<T> first(decode, shape, units[0], nullptr);
    Item* recalled_values = kept.at_least(first.recalled_size());
    first.pack_recalled(recalled_values);
    for (int head = 0; head < shape.num_kv_heads; head++) UnitRun<T>(decode, shape, units[head], recalled_values).run();
}

// What the units found for one row and query head, merged.
template <class T>
class RowMerge {
   public:
    RowMerge(const Shape& shape) : shape_(shape), output_(shape.width) {}

    void start() {
        std::fill(output_.begin(), output_.end(), 0.f);
        recalled_.clear();
        factors_ = nullptr;
        max_ = HIDDEN, sum_ = 0.f;
    }

    void add(const Unit& unit, int row) {
        const Tile& tile = *unit.tile;
        int num_rows = int(tile.num_rows) * shape_.group, width = recalled_width(tile);
        const float *maxima = unit.result, *sums = maxima + num_rows, *recalled = sums + num_rows;
        float max = maxima[row];
        if (sums[row] == 0.f && max == HIDDEN) return;
        float top = max > max_ || max != max ? max : max_;
        float old = max_ == HIDDEN ? 0.f : std::exp2(max_ - top), scale = std::exp2(max - top);
        max_ = top;
        sum_ = sum_ * old + sums[row] * scale;
        const float* out = recalled + num_rows * width + row * shape_.width;
        for (int d = 0; d < shape_.width; d += LANES)
            store(load(output_.data() + d) * old + load(out + d) * scale, output_.data() + d);
        const Factors* factors = factors_of(tile, row / shape_.group);
        if (factors) factors_ = factors;
        recalled_.resize(std::max<size_t>(recalled_.size(), width));
        for (size_t r = 0; r < recalled_.size(); r++)
            recalled_[r] = recalled_[r] * old + (factors && int(r) < width ? recalled[row * width + r] * scale : 0.f);
    }

    void finish(int head, T* out) {
        if (factors_) {
            for (int r = 0; r < factors_->rank; r++) {
                const T* b = static_cast<const T*>(factors_->b) + (int64_t(r) * shape_.num_kv_heads + head) * shape_.dim;
                for (int d = 0; d < shape_.dim; d += LANES)
                    store(load(output_.data() + d) + load_some(b + d, shape_.dim - d) * recalled_[r], output_.data() + d);
            }
        }
        for (int d = 0; d < shape_.dim; d += LANES)
            store_some(load(output_.data() + d) / splat(sum_), out + d, shape_.dim - d);
    }

   private:
    static const Factors* factors_of(const Tile& tile, int row) {
        for (int i = 0; i < tile.num_residuals; i++) {
            const Residual& r = tile.residuals[i];
            if (row >= r.row_begin && row < r.row_end) return r.v.rank ? &r.v : nullptr;
        }
        return nullptr;
    }

    const Shape& shape_;
    std::vector<float> output_, recalled_;
    const Factors* factors_ = nullptr;
    float max_ = HIDDEN, sum_ = 0.f;
};

struct Share {
    int first_unit;  // of head 0; heads follow one another
    int row;         // of the tile
};

template <class T>
void attend(const Decode& decode) {
    Shape shape = {int(decode.num_kv_heads), int(decode.group), int(decode.head_dim), whole_lanes(int(decode.head_dim))};
    std::vector<Unit> units;
    std::vector<std::vector<Share>> shares(decode.num_rows);
    size_t total = 0;
    for (int t = 0; t < decode.num_tiles; t++) {
        const Tile& tile = decode.tiles[t];
        size_t size = tile.num_rows * shape.group * (2 + recalled_width(tile) + shape.width);
        for (int64_t key = 0, next; key < tile.num_keys; key = next) {
            next = std::min(tile.num_keys, (tile.first_position + key) / UNIT * UNIT + UNIT - tile.first_position);
            for (int row = 0; row < tile.num_rows; row++) shares[tile.rows[row]].push_back({int(units.size()), row});
            for (int head = 0; head < shape.num_kv_heads; head++) {
                units.push_back({&tile, int(key), int(next - key), head, nullptr});
                total += size;
            }
        }
    }
    static thread_local std::vector<float> results;
    if (results.size() < total) results.resize(total);
    float* next = results.data();
    for (Unit& unit : units) {
        unit.result = next;
        next += unit.tile->num_rows * shape.group * (2 + recalled_width(*unit.tile) + shape.width);
    }
#pragma omp parallel num_threads(int(decode.num_threads))
    {
#pragma omp for schedule(dynamic, 1)
        for (size_t i = 0; i < units.size(); i += shape.num_kv_heads) run_heads<T>(decode, shape, &units[i]);
        RowMerge<T> merge(shape);
#pragma omp for collapse(2) schedule(static)
        for (int64_t row = 0; row < decode.num_rows; row++) {
            for (int head = 0; head < shape.num_kv_heads; head++) {
                for (int j = 0; j < shape.group; j++) {
                    merge.start();
                    for (const Share& share : shares[row])
                        merge.add(units[share.first_unit + head], share.row * shape.group + j);
                    int64_t at = decode.rows[row] * shape.num_kv_heads * shape.group + head * shape.group + j;
                    merge.finish(head, static_cast<T*>(decode.out) + at * shape.dim);
                }
            }
        }
    }
}

// One head of up to UNIT tokens.
template <class T>
class GatherUnit {
    typedef typename PackingOf<T>::type P;
    typedef typename P::Item Item;

   public:
    GatherUnit(const Gather& gather, int head) : g_(gather), head_(head), dim_(int(gather.head_dim)) {
        if (g_.factors.rank) builder_.emplace_back(g_.factors, int(g_.num_kv_heads), dim_, head);
        if (!g_.out) built_ = kept_.built.at_least(BLOCK * dim_);
        if (g_.packed) packed_ = kept_.packed.at_least(items<P>(dim_) * BLOCK);
    }

    void run(int64_t first, int64_t end) {
        for (int64_t next; first < end; first = next) {
            next = std::min(end, (g_.first_position + first) / BLOCK * BLOCK + BLOCK - g_.first_position);
            T* rows = g_.out ? static_cast<T*>(g_.out) + head_ * g_.out_stride + first * dim_ : built_;
            build(first, int(next - first), rows);
            if (g_.packed && first < g_.num_residual) put_packed(rows, first, int(std::min(next, g_.num_residual) - first));
        }
    }

   private:
    void build(int64_t first, int count, T* out) {
        int with = builder_.empty() ? 0 : int(std::clamp<int64_t>(g_.num_residual - first, 0, count));
        const T *rows[BLOCK], *a[BLOCK];
        for (int key = 0; key < count; key++)
            rows[key] = static_cast<const T*>(g_.pool) + (g_.slots[first + key] * g_.num_kv_heads + head_) * dim_;
        for (int key = with; key < count; key++) std::memcpy(out + key * dim_, rows[key], sizeof(T) * dim_);
        if (!with) return;
        for (int key = 0; key < with; key++)
            a[key] = static_cast<const T*>(g_.factors.a) + g_.residual_slots[first + key] * g_.factors.stride;
        const T* norm = g_.norm ? static_cast<const T*>(g_.norm) + head_ : nullptr;
        const T* change = g_.change ? static_cast<const T*>(g_.change) + head_ : nullptr;
        builder_[0].build(rows, a, with, g_.cos_sin ? g_.cos_sin + first * dim_ : nullptr, norm, g_.factors.stride, change,
                          g_.change_stride, g_.residual_slots, first, out);
    }

    // A block as `dot` reads it. Its other lanes are left alone: they are other tokens', written at another time.
    void put_packed(const T* keys, int64_t first, int count) {
        const T* rows[BLOCK];
        for (int i = 0; i < count; i++) rows[i] = keys + i * dim_;
        int64_t position = g_.first_position + first;
        if (!is_packed_in_place<T>) {
            T* at = static_cast<T*>(g_.packed) + head_ * g_.packed_stride + position * dim_;
            std::memcpy(at, keys, sizeof(T) * count * dim_);
            return;
        }
        Item* block = static_cast<Item*>(g_.packed) + head_ * g_.packed_stride / P::PAIR + position / BLOCK * items<P>(dim_) * BLOCK;
        if (count == BLOCK) return pack_keys(rows, count, dim_, block);
        pack_keys(rows, count, dim_, packed_);
        for (int d = 0; d < items<P>(dim_); d++)
            std::memcpy(block + d * BLOCK + position % BLOCK, packed_ + d * BLOCK, sizeof(Item) * count);
    }

    const Gather& g_;
    int head_, dim_;
    std::vector<ResidualBlock<T>> builder_;
    struct Kept {
        Buffer<T> built;
        Buffer<Item> packed;
    };
    static inline thread_local Kept kept_;  // one unit is gathered at a time on a thread
    T* built_ = nullptr;
    Item* packed_ = nullptr;
};

template <class T>
void gather(const Gather& g) {
    int64_t num_units = (g.num_tokens + UNIT - 1) / UNIT;
#pragma omp parallel for collapse(2) schedule(static) num_threads(int(g.num_threads))
    for (int64_t unit = 0; unit < num_units; unit++)
        for (int head = 0; head < g.num_kv_heads; head++)
            GatherUnit<T>(g, head).run(unit * UNIT, std::min((unit + 1) * UNIT, g.num_tokens));
}

}  // namespace
}  // namespace forkkv

extern "C" {
void forkkv_decode_bf16(const forkkv::Decode* decode) { forkkv::attend<forkkv::bf16>(*decode); }
void forkkv_decode_f32(const forkkv::Decode* decode) { forkkv::attend<float>(*decode); }
void forkkv_gather_bf16(const forkkv::Gather* g) { forkkv::gather<forkkv::bf16>(*g); }
void forkkv_gather_f32(const forkkv::Gather* g) { forkkv::gather<float>(*g); }
}
