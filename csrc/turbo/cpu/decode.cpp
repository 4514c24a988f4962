// turbo_decode on CPUs. A task takes one tile of query rows of one kv head through its pages. With
// few rows (decode) the context is split as well, and the parts are merged afterwards in order.
#include <algorithm>

#include "core/cpu/parallel.h"
#include "core/cpu/scratch.h"
#include "turbo/cpu/tile.h"

namespace kvcore::turbo {
namespace {

// Pages of one split. 16 (1024 tokens, 140 KiB of 4-bit K and V at head_dim 128) give 4 splits at
// 4k tokens, 32 at 32k: enough tasks for a socket at batch 1, while a split's partial result stays
// near 1 % of what it reads. A constant, so that results depend on no other sequence.
constexpr int64_t kSplitPages = 16;

struct Plan {
  int64_t group, num_rows;  // rows of a kv head
  int64_t num_tiles, num_splits;
};

Plan plan(const DecodeParams& p) {
  const int64_t group = p.q_heads / p.store.kv_heads;
  const int64_t num_rows = group * p.q_len;
  const int64_t max_pages = (p.max_seq_len + kPageTokens - 1) / kPageTokens;
  const int64_t splits = (max_pages + kSplitPages - 1) / kSplitPages;
  return {.group = group,
          .num_rows = num_rows,
          .num_tiles = (num_rows + kTileRows - 1) / kTileRows,
          .num_splits = num_rows <= kFewRows ? std::max<int64_t>(splits, 1) : 1};
}

const float* head_row(const float* rows, const Store& store, int64_t batch_idx, int64_t head) {
  return rows ? rows + (batch_idx * store.kv_heads + head) * store.head_dim : nullptr;
}

/// The block of a page and its width: in the pool, or the open one in the tail.
const uint8_t* find_block(const Store& store, int64_t batch_idx, int64_t kv, int64_t head,
                          int64_t page, int64_t seq_len, int* bits) {
  const int64_t row = (batch_idx * 2 + kv) * store.kv_heads + head;
  if (page == seq_len / kPageTokens) {
    *bits = 8;
    return store.tail + (row * kTailSlots + tail_slot(page)) * block_bytes(8, store.head_dim);
  }
  const int32_t entry = store.block_table[row * store.max_pages + page];
  const Slab& slab = store.slabs[entry_slab(entry)];
  *bits = slab.bits;
  return slab.data + entry_index(entry) * block_bytes(slab.bits, store.head_dim);
}

}  // namespace

namespace backend {

void decode(const DecodeParams& p) {
  const Store& store = p.store;
  const Plan work = plan(p);
  const int64_t num_units = store.batch * store.kv_heads * work.num_tiles;  // what gets an output
  const int64_t num_tasks = num_units * work.num_splits;
  const int64_t part_rows = work.num_splits > 1 ? work.num_rows : 0;
  const int64_t workers = max_workers(num_tasks);
  const auto tiles = make_scratch<RowTile>({workers});
  const auto partials = make_scratch<Partial>({num_tasks, part_rows});
  const auto partial_o = make_scratch<float>({num_tasks, part_rows, store.head_dim});

  const auto source_of = [&](int64_t unit) {
    const int64_t tile_idx = unit % work.num_tiles;
    const int64_t head = unit / work.num_tiles % store.kv_heads;
    const int64_t batch_idx = unit / work.num_tiles / store.kv_heads;
    const int64_t first_row = tile_idx * kTileRows;
    return TileSource{
        .q = p.q,
        .batch_idx = batch_idx,
        .kv_head = head,
        .group = work.group,
        .first_token = 0,
        .q_len = p.q_len,
        .kv_len = store.seq_lens[batch_idx],
        .first_row = first_row,
        .num_rows = static_cast<int>(std::min<int64_t>(kTileRows, work.num_rows - first_row)),
        .head_dim = static_cast<int>(store.head_dim),
        .k_balance = head_row(p.calibration.k_balance, store, batch_idx, head),
        .k_mean = head_row(p.calibration.k_mean, store, batch_idx, head)};
  };
  // Splits that some row of a unit sees: the others are neither computed nor merged.
  const auto splits_of = [&](const PageRange& pages) {
    return work.num_splits == 1
               ? PageRange{0, 1}
               : PageRange{pages.begin / kSplitPages, (pages.end + kSplitPages - 1) / kSplitPages};
  };
  const auto pages_of = [&](const TileSource& s) {
    return visible_pages(p.softmax, s.q_len, s.kv_len, s.first_row / s.group,
                         (s.first_row + s.num_rows - 1) / s.group);
  };

  auto* const load = KVCORE_ISA_SELECT(load_tile);
  auto* const attend = KVCORE_ISA_SELECT(attend_pages);
  auto* const save = KVCORE_ISA_SELECT(save_partial);
  auto* const merge = KVCORE_ISA_SELECT(merge_partials);
  auto* const finish = KVCORE_ISA_SELECT(store_tile);
  const TileOutput output = {.out = p.out, .lse = p.lse, .q_heads = p.q_heads, .q_tokens = p.q_len};

  parallel_tasks(num_tasks, [&](int64_t task, int64_t worker) {
    const TileSource source = source_of(task / work.num_splits);
    const int64_t split = task % work.num_splits;
    PageRange pages = pages_of(source);
    const PageRange splits = splits_of(pages);
    if (split < splits.begin || split >= splits.end) return;
    if (work.num_splits > 1) {
      pages.begin = std::max(pages.begin, split * kSplitPages);
      pages.end = std::min(pages.end, (split + 1) * kSplitPages);
    }
    RowTile& tile = tiles[worker];
    load(source, p.softmax, tile);
    for (int64_t first = pages.begin; first < pages.end; first += kSplitPages) {
      Page part[kSplitPages];
      const int64_t count = std::min(kSplitPages, pages.end - first);
      for (int64_t i = 0; i < count; ++i) {
        const int64_t page = first + i;
        part[i].first_key = page * kPageTokens;
        part[i].k = find_block(store, source.batch_idx, 0, source.kv_head, page, source.kv_len,
                               &part[i].k_bits);
        part[i].v = find_block(store, source.batch_idx, 1, source.kv_head, page, source.kv_len,
                               &part[i].v_bits);
      }
      attend(tile, part, count, p.softmax);
    }
    if (work.num_splits > 1) {
      save(tile, &partials[task * part_rows], &partial_o[task * part_rows * store.head_dim]);
    } else {
      finish(tile, source, output);
    }
  });
  if (work.num_splits == 1) return;

  parallel_tasks(num_units, [&](int64_t unit, int64_t worker) {
    const TileSource source = source_of(unit);
    const PageRange splits = splits_of(pages_of(source));
    const int64_t first = (unit * work.num_splits + splits.begin) * part_rows;
    RowTile& tile = tiles[worker];
    load(source, p.softmax, tile);
    merge(&partials[first], &partial_o[first * store.head_dim], splits.end - splits.begin, tile);
    finish(tile, source, output);
  });
}

}  // namespace backend
}  // namespace kvcore::turbo
