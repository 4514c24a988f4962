// lexico_encode on CPUs. A task takes a block of vectors through all their steps. The search for
// the next atom is nearly all the work, and there are two ways to do it: products of the residual
// with every atom (head_dim multiply-adds an atom), or the products of the vector, computed once,
// minus the selected atoms' rows of the Gram matrix (as many multiply-adds an atom as atoms were
// selected). The second needs the matrix: it is worth computing for many vectors. Both are in
// 16-bit integers, and what could be the largest product is computed again in fp32.
#include <algorithm>

#include "core/cpu/parallel.h"
#include "core/cpu/scratch.h"
#include "lexico/cpu/encode_kernels.h"

namespace kvcore::lexico {
namespace {

// The matrix costs about what `atoms` steps of the first way cost.
bool computes_gram(const EncodeParams& p, int64_t num_vectors) {
  // Beyond that many atoms the matrix (128 MiB here) is too much memory for scratch.
  constexpr int64_t kMaxGramAtoms = 8192;
  return p.atoms <= kMaxGramAtoms && num_vectors >= p.atoms / p.sparsity;
}

// The matrix in bytes saves each vector about a third of what its rows take, which grows with the
// square of their number, and costs a quarter of what the matrix itself does: measured (Zen 4, one
// core, 4096 random atoms, 2026-11-21), it pays from 3,400 vectors of 8 atoms and 1,300 of 16. With
// more than 24 atoms the last steps need whole rows, and nothing is gained.
bool computes_coarse(const EncodeParams& p, int64_t num_vectors) {
  constexpr int64_t kMaxCoarseSparsity = 24;
  return p.sparsity <= kMaxCoarseSparsity &&
         num_vectors >= 80 * p.atoms / (p.sparsity * p.sparsity);
}

}  // namespace

namespace backend {

void encode(const EncodeParams& p) {
  const int64_t num_vectors = p.batch * p.heads * p.tokens;
  const int64_t panels = num_panels(p.atoms), padded = padded_atoms(p.atoms);
  const bool computed = computes_gram(p, num_vectors), with_gram = computed || p.gram;
  const bool in_bytes = computed && computes_coarse(p, num_vectors);
  const int64_t block = with_gram ? kGramBlock : kRecomputeBlock;
  const int64_t num_tasks = (num_vectors + block - 1) / block;
  const int64_t workers = max_workers(num_tasks);
  // Nothing is needed for what the other search works with.
  const int64_t searched = with_gram ? block + 1 : 0, recomputed = with_gram ? 0 : block;
  const int64_t converted = with_gram && !computed ? kTurns : 0;
  const int64_t factor = 2 * p.sparsity * factor_stride(p.sparsity);

  const auto packed = make_aligned_scratch<int16_t>({padded, p.head_dim});
  const auto gram = make_aligned_scratch<int16_t>({computed ? p.atoms : 0, padded});
  const auto coarse = make_aligned_scratch<int16_t>({in_bytes ? p.atoms : 0, padded / 2});
  const auto scales = make_scratch<CoarseScale>({in_bytes ? p.atoms : 0});
  const auto pursuits = make_scratch<Pursuit>({workers, block});
  const auto factors = make_aligned_scratch<double>({workers, block, factor});
  const auto vectors = make_aligned_scratch<float>({workers, block, p.head_dim});
  const auto residuals = make_aligned_scratch<float>({workers, recomputed, p.head_dim});
  const auto maxima = make_aligned_scratch<int32_t>({workers, recomputed, panels, kMaximaLanes});
  const auto correlations = make_aligned_scratch<int16_t>({workers, searched, padded});
  const auto rows = make_aligned_scratch<int16_t>({workers, converted, p.sparsity, padded});
  // Zeros: a tile of rows may reach past the vectors of its block.
  std::fill_n(residuals.get(), workers * recomputed * p.head_dim, 0.0f);

  auto* const pack = KVCORE_ISA_SELECT(pack_dictionary_kernel);
  auto* const fill_gram = KVCORE_ISA_SELECT(gram_kernel);
  auto* const fill_coarse = KVCORE_ISA_SELECT(coarse_kernel);
  auto* const kernel = KVCORE_ISA_SELECT(encode_kernel);
  parallel_for(0, panels, 4,
               [&](int64_t begin, int64_t end) { pack(p, with_gram, begin, end, packed.get()); });
  if (computed) {
    parallel_tasks(panels, [&](int64_t panel, int64_t) {
      if (panel * kPanelAtoms < p.atoms) fill_gram(p, packed.get(), panel, gram.get());
    });
  }
  if (in_bytes) {
    parallel_for(0, p.atoms, 16, [&](int64_t begin, int64_t end) {
      fill_coarse(p, gram.get(), begin, end, coarse.get(), scales.get());
    });
  }
  const EncodeTables tables = {.panels = packed.get(),
                               .gram = computed ? gram.get() : nullptr,
                               .coarse = in_bytes ? coarse.get() : nullptr,
                               .scales = scales.get()};
  parallel_tasks(num_tasks, [&](int64_t task, int64_t worker) {
    const EncodeScratch scratch = {.pursuits = &pursuits[worker * block],
                                   .factors = &factors[worker * block * factor],
                                   .vectors = &vectors[worker * block * p.head_dim],
                                   .residuals = &residuals[worker * recomputed * p.head_dim],
                                   .maxima = &maxima[worker * recomputed * panels * kMaximaLanes],
                                   .correlations = &correlations[worker * searched * padded],
                                   .rows = &rows[worker * converted * p.sparsity * padded]};
    kernel(p, tables, scratch, with_gram, task * block, std::min((task + 1) * block, num_vectors));
  });
}

}  // namespace backend
}  // namespace kvcore::lexico
