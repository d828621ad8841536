// What Python hands over: rows of 64-bit integers, addresses among them. The field order is that of ``structs.py``.
#pragma once

#include <cstdint>

namespace forkkv {

// Tokens in a pool: consecutive from `first`, or at the slots listed.
struct Slots {
    int64_t first;
    const int64_t* listed;
    int64_t operator[](int64_t token) const { return listed ? listed[token] : first + token; }
};

// A low-rank part of K or V: a [slots, stride] of which `rank` columns count, b [rank, num_kv_heads * head_dim].
struct Factors {
    const void* a;
    int64_t stride;
    int64_t rank;  // 0: none
    const void* b;
};

// One adapter's residual over the tokens of a tile, for rows [row_begin, row_end) of it.
struct Residual {
    int64_t row_begin, row_end;
    Slots slots;
    Factors k, v;
    const void* norm;      // QK-norm: n(k) and its change, [slots, num_kv_heads] at the strides of k.a and v.a; else null
    const void* change;
    int64_t change_stride;
    const void* merged_k;  // whole K, instead of base K and k: [num_kv_heads][position / 64][head_dim][64], as `pack_keys` packs,
                           // or [num_kv_heads][position][head_dim] where a packed key is larger than a key
    int64_t merged_stride;  // elements from one head to the next
};

// Tokens [first_position, first_position + num_keys) at `slots`, read by `num_rows` rows.
struct Tile {
    int64_t first_position, num_keys;
    Slots slots;
    int64_t num_rows;
    const int64_t* rows;    // numbers among the decode rows
    const int64_t* limits;  // keys of the tile that a row sees, or null: all
    int64_t num_residuals;
    const Residual* residuals;  // ascending and disjoint in rows
};

struct Decode {
    int64_t num_kv_heads, group, head_dim;
    int64_t num_rows;
    const int64_t* rows;  // of q and out
    const void* q;        // [T, num_kv_heads * group, head_dim] rotated, not scaled
    void* out;            // likewise
    const void* base_k;   // [slots, num_kv_heads, head_dim]
    const void* base_v;
    const float* cos_sin;  // [positions, head_dim]
    int64_t num_tiles;
    const Tile* tiles;
    int64_t num_threads;
};

// K or V of one sequence, head by head.
struct Gather {
    int64_t num_kv_heads, head_dim;
    int64_t num_tokens;
    Slots slots;
    const void* pool;  // [slots, num_kv_heads, head_dim]
    void* out;           // [num_kv_heads, num_tokens, head_dim], or null
    int64_t out_stride;  // elements from one head to the next
    void* packed;        // K of tokens [0, num_residual) as `Residual::merged_k` from position 0 on, or null
    int64_t packed_stride;
    int64_t first_position;  // of the first token
    int64_t num_residual;  // tokens [0, num_residual) get the residual
    Slots residual_slots;
    Factors factors;
    const float* cos_sin;  // [num_tokens, head_dim]; null for V
    const void* norm;
    const void* change;
    int64_t change_stride;
    int64_t num_threads;
};

// One module of a LoRA group: its columns of the shrink, its columns of the output, b [rank, out_end - out_begin].
struct LoraPart {
    int64_t rank_begin, rank_end, out_begin, out_end;
    const void* b;
};

// One adapter's group of modules for rows [row_begin, row_end): a [rank, in]; ones [rank] or null.
struct LoraSegment {
    int64_t row_begin, row_end;
    int64_t rank;
    const void* a;
    const void* ones;
    int64_t num_parts;
    const LoraPart* parts;
};

struct Lora {
    int64_t in;
    const void* x;  // [T, in]
    void* out;      // [T, out_stride]
    int64_t out_stride;
    int64_t num_segments;
    const LoraSegment* segments;
    int64_t num_threads;
};

struct RopeStore {
    int64_t num_rows, num_heads, num_kv_heads, head_dim;
    const void* qkv;       // [T, num_heads + 2 num_kv_heads, head_dim]
    const float* cos_sin;  // [T, head_dim]
    const void* q_norm;    // [head_dim], null where the family has none
    const void* k_norm;
    double eps;
    void* q;               // [T, num_heads, head_dim]
    const int64_t* slots;  // [T], -1: K and V of this row are not kept
    void* k_cache;         // [slots, num_kv_heads, head_dim]
    void* v_cache;
    int64_t num_threads;
};

}  // namespace forkkv
