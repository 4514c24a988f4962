// The store on CPUs: codes go into the tail and out of it, full tails into blocks and out of them.
// What moves is a few bytes a token, so plain loops will do; a task takes one head.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <stdexcept>
#include <string>

#include "core/cpu/parallel.h"
#include "core/cpu/scratch.h"
#include "lexico/cpu/blocks.h"

namespace kvcore::lexico {
namespace {

/// Writes the codes of tokens [0, num_new) behind the `begin` that a head's tail holds.
void append_head(const int16_t* indices, const int8_t* coefficients, const uint16_t* scale,
                 int64_t num_new, int64_t sparsity, int64_t begin, uint8_t* tail) {
  for (int64_t i = 0; i < num_new; ++i) {
    const int64_t token = begin + i, lane = token % kTileTokens;
    const MutableTile tile =
        mutable_tile_at(tail + token / kTileTokens * tile_bytes(sparsity), sparsity);
    tile.scale[lane] = scale[i];
    for (int64_t j = 0; j < sparsity; ++j) {
      tile.indices[j * kTileTokens + lane] = indices[i * sparsity + j];
      tile.coefficients[j * kTileTokens + lane] = coefficients[i * sparsity + j];
    }
  }
}

/// The most pairs that a token of a tile has.
int64_t used_width(const Tile& tile) {
  int64_t width = 0;
  for (int lane = 0; lane < kTileTokens; ++lane) {
    int64_t pairs = 0;
    for (int64_t j = 0; j < tile.width; ++j) {
      pairs += tile.coefficients[j * kTileTokens + lane] != 0;
    }
    width = std::max(width, pairs);
  }
  return width;
}

void seal_k(const uint8_t* tail, int64_t sparsity, uint8_t* block) {
  uint8_t* out = block + kBlockTiles;
  for (int64_t t = 0; t < kBlockTiles; ++t) {
    const Tile tile = tile_at(tail + t * tile_bytes(sparsity), sparsity);
    const int64_t width = used_width(tile);
    block[t] = static_cast<uint8_t>(width);
    const MutableTile sealed = mutable_tile_at(out, width);
    memcpy(sealed.scale, tile.scale, 2 * kTileTokens);
    for (int lane = 0; lane < kTileTokens; ++lane) {
      int64_t pair = 0;
      for (int64_t j = 0; j < sparsity; ++j) {
        const int64_t from = j * kTileTokens + lane, to = pair * kTileTokens + lane;
        if (tile.coefficients[from] == 0) continue;
        sealed.indices[to] = tile.indices[from];
        sealed.coefficients[to] = tile.coefficients[from];
        ++pair;
      }
    }
    out += tile_bytes(width);
  }
}

/// False if an atom has more pairs than a block can count: 4096 codes of distinct atoms have not.
/// `next` [atoms] is working memory.
bool seal_v(const uint8_t* tail, int64_t sparsity, int64_t atoms, uint8_t* block, int64_t* next) {
  uint16_t* const counts = reinterpret_cast<uint16_t*>(block + kBlockCounts);
  const auto each_pair = [&](const auto& f) {
    for (int64_t token = 0; token < kBlockTokens; ++token) {
      const Tile tile = tile_at(tail + token / kTileTokens * tile_bytes(sparsity), sparsity);
      for (int64_t j = 0; j < sparsity; ++j) {
        const int64_t i = j * kTileTokens + token % kTileTokens;
        if (tile.coefficients[i] != 0) f(token, tile.indices[i], tile.coefficients[i]);
      }
    }
  };
  for (int64_t t = 0; t < kBlockTiles; ++t) {
    memcpy(block + 2 * t * kTileTokens, tail + t * tile_bytes(sparsity), 2 * kTileTokens);
  }
  std::fill_n(next, atoms, 0);
  each_pair([&](int64_t, int64_t atom, int8_t) { ++next[atom]; });
  int64_t pairs = 0;
  for (int64_t n = 0; n < atoms; ++n) {
    if (next[n] > kMaxAtomPairs) return false;
    counts[n] = static_cast<uint16_t>(next[n]);
    const int64_t first = pairs;
    pairs += next[n];
    next[n] = first;
  }
  uint16_t* const tokens = reinterpret_cast<uint16_t*>(block + block_token_ids(atoms));
  int8_t* const coefficients = reinterpret_cast<int8_t*>(block + block_coefficients(atoms, pairs));
  each_pair([&](int64_t token, int64_t atom, int8_t coefficient) {
    tokens[next[atom]] = static_cast<uint16_t>(token);
    coefficients[next[atom]] = coefficient;
    ++next[atom];
  });
  return true;
}

/// False if the block is not one that seal_k makes with that sparsity.
bool unseal_k(const uint8_t* block, int64_t bytes, int64_t sparsity, uint8_t* tail) {
  KBlock k;
  if (!open_k_block(block, bytes, &k)) return false;
  const uint8_t* in = k.tiles;
  for (int64_t t = 0; t < kBlockTiles; ++t) {
    const Tile sealed = tile_at(in, k.widths[t]);
    if (sealed.width > sparsity) return false;
    const MutableTile tile = mutable_tile_at(tail + t * tile_bytes(sparsity), sparsity);
    memcpy(tile.scale, sealed.scale, 2 * kTileTokens);
    memcpy(tile.indices, sealed.indices, 2 * kTileTokens * sealed.width);
    memcpy(tile.coefficients, sealed.coefficients, kTileTokens * sealed.width);
    in += tile_bytes(sealed.width);
  }
  return true;
}

/// False if the block is not one that seal_v makes with that sparsity and as many atoms. `used`
/// [kBlockTokens] is working memory.
bool unseal_v(const uint8_t* block, int64_t bytes, int64_t sparsity, int64_t atoms, uint8_t* tail,
              uint8_t* used) {
  VBlock v;
  if (!open_v_block(block, bytes, atoms, &v)) return false;
  memset(used, 0, kBlockTokens);
  for (int64_t t = 0; t < kBlockTiles; ++t) {
    memcpy(tail + t * tile_bytes(sparsity), v.scale + t * kTileTokens, 2 * kTileTokens);
  }
  int64_t pair = 0;
  for (int64_t n = 0; n < atoms; ++n) {
    for (int64_t i = 0; i < v.counts[n]; ++i, ++pair) {
      const int64_t token = v.tokens[pair];
      if (token >= kBlockTokens || used[token] == sparsity) return false;
      const MutableTile tile =
          mutable_tile_at(tail + token / kTileTokens * tile_bytes(sparsity), sparsity);
      const int64_t to = used[token]++ * kTileTokens + token % kTileTokens;
      tile.indices[to] = static_cast<int16_t>(n);
      tile.coefficients[to] = v.coefficients[pair];
    }
  }
  return true;
}

}  // namespace

namespace backend {

void append(const AppendParams& p) {
  const int64_t heads = p.batch * p.kv_heads;
  parallel_for(0, 2 * heads, 1, [&](int64_t task_begin, int64_t task_end) {
    for (int64_t task = task_begin; task < task_end; ++task) {
      const int64_t head = task / 2, begin = p.tail_lens[head / p.kv_heads];
      const int64_t first = head * p.num_new;
      if (task % 2 == 0) {
        append_head(p.k_indices + first * p.k_sparsity, p.k_coefficients + first * p.k_sparsity,
                    p.k_scale + first, p.num_new, p.k_sparsity, begin,
                    p.k_tail + head * p.k_tiles * tile_bytes(p.k_sparsity));
      } else {
        append_head(p.v_indices + first * p.v_sparsity, p.v_coefficients + first * p.v_sparsity,
                    p.v_scale + first, p.num_new, p.v_sparsity, begin,
                    p.v_tail + head * p.v_tiles * tile_bytes(p.v_sparsity));
      }
    }
  });
  for (int64_t b = 0; b < p.batch; ++b) p.tail_lens[b] += static_cast<int32_t>(p.num_new);
}

SealSizes seal_sizes(const SealParams& p) {
  SealSizes sizes = {.k_bytes = 0, .v_bytes = 0, .bad_index = -1};
  for (int64_t head = 0; head < p.batch * p.kv_heads; ++head) {
    int64_t k_bytes = kBlockTiles, pairs = 0;
    for (int64_t t = head * kBlockTiles; t < (head + 1) * kBlockTiles; ++t) {
      k_bytes +=
          tile_bytes(used_width(tile_at(p.k_tail + t * tile_bytes(p.k_sparsity), p.k_sparsity)));
      const Tile tile = tile_at(p.v_tail + t * tile_bytes(p.v_sparsity), p.v_sparsity);
      for (int64_t i = 0; i < p.v_sparsity * kTileTokens; ++i) {
        if (tile.coefficients[i] == 0) continue;
        ++pairs;
        const int64_t index = static_cast<uint16_t>(tile.indices[i]);
        if (index >= p.v_atoms) sizes.bad_index = std::max(sizes.bad_index, index);
      }
    }
    sizes.k_bytes = std::max(sizes.k_bytes, align_block(k_bytes));
    sizes.v_bytes = std::max(sizes.v_bytes, v_block_bytes(p.v_atoms, pairs));
  }
  return sizes;
}

void seal(const SealParams& p) {
  const int64_t heads = p.batch * p.kv_heads;
  const auto next = make_scratch<int64_t>({max_workers(heads), p.v_atoms});
  std::atomic<bool> distinct{true};
  parallel_tasks(heads, [&](int64_t head, int64_t worker) {
    seal_k(p.k_tail + head * kBlockTiles * tile_bytes(p.k_sparsity), p.k_sparsity,
           p.k_block + head * p.k_bytes);
    if (!seal_v(p.v_tail + head * kBlockTiles * tile_bytes(p.v_sparsity), p.v_sparsity, p.v_atoms,
                p.v_block + head * p.v_bytes, &next[worker * p.v_atoms])) {
      distinct = false;
    }
  });
  if (!distinct) {
    throw std::runtime_error("lexico_seal: v_tail must be codes of distinct atoms, got more than " +
                             std::to_string(kMaxAtomPairs) + " pairs of one");
  }
}

void unseal(const UnsealParams& p) {
  const int64_t heads = p.batch * p.kv_heads;
  const auto used = make_scratch<uint8_t>({max_workers(heads), kBlockTokens});
  std::atomic<bool> k_valid{true}, v_valid{true};
  parallel_tasks(heads, [&](int64_t head, int64_t worker) {
    if (!unseal_k(p.k_block + head * p.k_bytes, p.k_bytes, p.k_sparsity,
                  p.k_tail + head * kBlockTiles * tile_bytes(p.k_sparsity))) {
      k_valid = false;
    }
    if (!unseal_v(p.v_block + head * p.v_bytes, p.v_bytes, p.v_sparsity, p.v_atoms,
                  p.v_tail + head * kBlockTiles * tile_bytes(p.v_sparsity),
                  &used[worker * kBlockTokens])) {
      v_valid = false;
    }
  });
  if (!k_valid) {
    throw std::runtime_error("lexico_unseal: k_block must be codes of sparsity " +
                             std::to_string(p.k_sparsity) +
                             " as lexico_seal made them, got others");
  }
  if (!v_valid) {
    throw std::runtime_error("lexico_unseal: v_block must be codes of sparsity " +
                             std::to_string(p.v_sparsity) + " over " + std::to_string(p.v_atoms) +
                             " atoms as lexico_seal made them, got others");
  }
}

void unpack(const UnpackParams& p) {
  parallel_for(0, p.batch * p.kv_heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t head = begin; head < end; ++head) {
      const uint8_t* tail = p.tail + head * p.tiles * tile_bytes(p.sparsity);
      for (int64_t token = 0; token < p.kv_len; ++token) {
        const Tile tile = tile_at(tail + token / kTileTokens * tile_bytes(p.sparsity), p.sparsity);
        const int64_t lane = token % kTileTokens, row = head * p.kv_len + token;
        p.scale[row] = tile.scale[lane];
        for (int64_t j = 0; j < p.sparsity; ++j) {
          p.indices[row * p.sparsity + j] = tile.indices[j * kTileTokens + lane];
          p.coefficients[row * p.sparsity + j] = tile.coefficients[j * kTileTokens + lane];
        }
      }
    }
  });
}

}  // namespace backend
}  // namespace kvcore::lexico
