// turbo_attention on CPUs: K and V are quantized once to 8-bit blocks in scratch, page by page;
// then each task takes one tile of query rows of one kv head through the pages that it sees.
#include <algorithm>
#include <vector>

#include "core/cpu/parallel.h"
#include "core/cpu/scratch.h"
#include "turbo/cpu/tile.h"

namespace kvcore::turbo {
namespace {

constexpr int64_t kPagesPerCall = 16;

/// One sequence: a batch entry, or a run of packed tokens.
struct Sequence {
  int64_t batch_idx;
  int64_t q_begin, q_len;
  int64_t kv_begin, kv_len;
  PageRange pages;      // that some row sees
  int64_t first_block;  // in scratch: [2, kv_heads, pages]
  int64_t num_tiles;    // of each kv head
  int64_t first_task;   // tasks of a sequence: [num_tiles, kv_heads]
};

std::vector<Sequence> sequences(const AttentionParams& p, int64_t group) {
  const bool packed = p.cu_seqlens_q != nullptr;
  std::vector<Sequence> result(static_cast<size_t>(packed ? p.num_seqs : p.batch));
  int64_t block = 0, task = 0;
  for (int64_t i = 0; i < static_cast<int64_t>(result.size()); ++i) {
    Sequence& s = result[i];
    s.batch_idx = packed ? 0 : i;
    s.q_begin = packed ? p.cu_seqlens_q[i] : 0;
    s.q_len = packed ? p.cu_seqlens_q[i + 1] - s.q_begin : p.q_len;
    s.kv_begin = packed ? p.cu_seqlens_k[i] : 0;
    s.kv_len = packed ? p.cu_seqlens_k[i + 1] - s.kv_begin : p.kv_len;
    s.pages =
        s.q_len > 0 ? visible_pages(p.softmax, s.q_len, s.kv_len, 0, s.q_len - 1) : PageRange{0, 0};
    s.first_block = block;
    block += 2 * p.kv_heads * (s.pages.end - s.pages.begin);
    s.num_tiles = (s.q_len * group + kTileRows - 1) / kTileRows;
    s.first_task = task;
    task += s.num_tiles * p.kv_heads;
  }
  return result;
}

/// The sequence that owns the unit `index`, units being counted by `first`. Sequences without units
/// begin where the next one does, so the last one that does not begin later is the owner.
const Sequence& owner(const std::vector<Sequence>& all, int64_t Sequence::* first, int64_t index) {
  const auto after = std::upper_bound(
      all.begin(), all.end(), index,
      [first](int64_t value, const Sequence& sequence) { return value < sequence.*first; });
  return *(after - 1);
}

const float* head_row(const float* rows, const AttentionParams& p, const Sequence& s,
                      int64_t head) {
  return rows ? rows + (s.batch_idx * p.kv_heads + head) * p.head_dim : nullptr;
}

}  // namespace

namespace backend {

void attention(const AttentionParams& p) {
  const int64_t group = p.q_heads / p.kv_heads;
  const std::vector<Sequence> all = sequences(p, group);
  if (all.empty()) return;
  const Sequence& last = all.back();
  const int64_t num_blocks =
      last.first_block + 2 * p.kv_heads * (last.pages.end - last.pages.begin);
  const int64_t num_tasks = last.first_task + last.num_tiles * p.kv_heads;
  const int64_t bytes = block_bytes(8, p.head_dim);
  const auto blocks = make_scratch<uint8_t>({num_blocks, bytes});
  const auto tiles = make_scratch<RowTile>({max_workers(num_tasks)});

  auto* const quantize = KVCORE_ISA_SELECT(quantize_page);
  parallel_for(0, num_blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Sequence& s = owner(all, &Sequence::first_block, i);
      const int64_t num_pages = s.pages.end - s.pages.begin;
      const int64_t page = s.pages.begin + (i - s.first_block) % num_pages;
      const int64_t head = (i - s.first_block) / num_pages % p.kv_heads;
      const int kv = (i - s.first_block) / num_pages < p.kv_heads ? 0 : 1;
      const int64_t token = page * kPageTokens;
      quantize(kv == 0 ? p.k : p.v, kv == 0 ? head_row(p.calibration.k_mean, p, s, head) : nullptr,
               kv == 0 ? head_row(p.calibration.k_balance, p, s, head) : nullptr, s.batch_idx, head,
               s.kv_begin + token, std::min<int64_t>(kPageTokens, s.kv_len - token), kv,
               static_cast<int>(p.head_dim), &blocks[i * bytes]);
    }
  });

  auto* const load = KVCORE_ISA_SELECT(load_tile);
  auto* const attend = KVCORE_ISA_SELECT(attend_pages);
  auto* const store = KVCORE_ISA_SELECT(store_tile);
  const TileOutput output = {.out = p.out, .lse = p.lse, .q_heads = p.q_heads, .q_tokens = p.q_len};
  parallel_tasks(num_tasks, [&](int64_t task, int64_t worker) {
    const Sequence& s = owner(all, &Sequence::first_task, task);
    const int64_t head = (task - s.first_task) % p.kv_heads;
    // With a causal mask the last tiles see the most keys: they come first.
    const int64_t tile_idx = s.num_tiles - 1 - (task - s.first_task) / p.kv_heads;
    const int64_t first_row = tile_idx * kTileRows;
    const int64_t num_rows = std::min<int64_t>(kTileRows, s.q_len * group - first_row);
    const TileSource source = {.q = p.q,
                               .batch_idx = s.batch_idx,
                               .kv_head = head,
                               .group = group,
                               .first_token = s.q_begin,
                               .q_len = s.q_len,
                               .kv_len = s.kv_len,
                               .first_row = first_row,
                               .num_rows = static_cast<int>(num_rows),
                               .head_dim = static_cast<int>(p.head_dim),
                               .k_balance = head_row(p.calibration.k_balance, p, s, head),
                               .k_mean = head_row(p.calibration.k_mean, p, s, head)};
    RowTile& tile = tiles[worker];
    load(source, p.softmax, tile);
    const int64_t num_pages = s.pages.end - s.pages.begin;
    const uint8_t* k = &blocks[(s.first_block + head * num_pages) * bytes];
    const uint8_t* v = k + p.kv_heads * num_pages * bytes;
    const PageRange range = visible_pages(p.softmax, s.q_len, s.kv_len, first_row / group,
                                          (first_row + num_rows - 1) / group);
    for (int64_t first = range.begin; first < range.end; first += kPagesPerCall) {
      Page pages[kPagesPerCall];
      const int64_t count = std::min(kPagesPerCall, range.end - first);
      for (int64_t i = 0; i < count; ++i) {
        const int64_t offset = (first + i - s.pages.begin) * bytes;
        pages[i] = {.k = k + offset,
                    .v = v + offset,
                    .k_bits = 8,
                    .v_bits = 8,
                    .first_key = (first + i) * kPageTokens};
      }
      attend(tile, pages, count, p.softmax);
    }
    store(tile, source, output);
  });
}

}  // namespace backend
}  // namespace kvcore::turbo
