// lexico_encode on CPUs. A task takes a block of vectors through all their steps. The search for
// the next atom is nearly all the work, and there are two ways to do it: products of the residual
// with every atom (head_dim multiply-adds an atom), or the products of the vector, computed once,
// minus the selected atoms' rows of the Gram matrix (as many multiply-adds an atom as atoms were
// selected). The second needs the matrix: it is worth computing for many vectors. With AVX-512 BF16
// the first multiplies bf16, and what could be the largest product is computed again in fp32.
#include <algorithm>
#include <cstddef>

#include "core/cpu/parallel.h"
#include "core/cpu/scratch.h"
#include "lexico/cpu/encode_kernels.h"

namespace kvcore::lexico {
namespace {

// The matrix costs what sparsity * num_vectors = atoms of the first way cost.
bool computes_gram(const EncodeParams& p, int64_t num_vectors) {
  // Beyond that many atoms the matrix (256 MiB here) is too much memory for scratch.
  constexpr int64_t kMaxGramAtoms = 8192;
  return p.atoms <= kMaxGramAtoms && num_vectors >= p.atoms / std::max<int64_t>(p.sparsity / 2, 1);
}

}  // namespace

namespace backend {

void encode(const EncodeParams& p) {
  const int64_t num_vectors = p.batch * p.heads * p.tokens;
  const int64_t panels = num_panels(p.atoms);
  const bool with_gram = p.gram || computes_gram(p, num_vectors);
  const int64_t block = with_gram ? kGramBlock : kRecomputeBlock;
  const int64_t num_tasks = (num_vectors + block - 1) / block;
  const int64_t workers = max_workers(num_tasks);

  const auto packed = make_scratch<std::byte>({panels, p.head_dim, kPanelAtoms, sizeof(float)});
  const auto computed = make_scratch<float>({with_gram && !p.gram ? p.atoms : 0, p.atoms});
  const auto pursuits = make_scratch<Pursuit>({workers, block});
  // Zeros: a tile of rows may reach past the vectors of its block.
  const auto vectors = make_scratch<float>({workers, block, p.head_dim});
  const auto residuals = make_scratch<float>({workers, with_gram ? 0 : block, p.head_dim});
  const auto correlations =
      make_scratch<float>({workers, with_gram ? block : 0, padded_atoms(p.atoms)});
  std::fill_n(vectors.get(), workers * block * p.head_dim, 0.0f);
  std::fill_n(residuals.get(), with_gram ? 0 : workers * block * p.head_dim, 0.0f);

  auto* const pack = KVCORE_ISA_SELECT(pack_dictionary_kernel);
  auto* const fill_gram = KVCORE_ISA_SELECT(gram_kernel);
  auto* const kernel = KVCORE_ISA_SELECT(encode_kernel);
  parallel_for(0, panels, 4,
               [&](int64_t begin, int64_t end) { pack(p, with_gram, begin, end, packed.get()); });
  EncodeTables tables = {.panels = packed.get(), .gram = p.gram};
  if (with_gram && !p.gram) {
    constexpr int64_t kRows = 8 * kRowTile;
    parallel_tasks((p.atoms + kRows - 1) / kRows, [&](int64_t task, int64_t) {
      fill_gram(p, tables.panels, task * kRows, std::min((task + 1) * kRows, p.atoms),
                computed.get());
    });
    tables.gram = computed.get();
  }
  parallel_tasks(num_tasks, [&](int64_t task, int64_t worker) {
    const EncodeScratch scratch = {
        .pursuits = &pursuits[worker * block],
        .vectors = &vectors[worker * block * p.head_dim],
        .residuals = with_gram ? nullptr : &residuals[worker * block * p.head_dim],
        .correlations =
            with_gram ? &correlations[worker * block * padded_atoms(p.atoms)] : nullptr};
    kernel(p, tables, scratch, task * block, std::min((task + 1) * block, num_vectors));
  });
}

}  // namespace backend
}  // namespace kvcore::lexico
