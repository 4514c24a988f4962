// The step of lexico_encode after a search: a warp takes a vector, decides between the two
// candidates in fp32, adds the atom to the code and leaves the new residual, or writes the code.
//
// State of a vector with k atoms: the rows F_j of the inverse of the Cholesky factor of the atoms'
// Gram matrix, in fp64. The new atom d has the components z_j = F_j . p along the orthonormalised
// earlier ones, p its products with them, and the squared distance d . d - sum z_j^2 from their
// span; its norm is not taken for 1, or a near neighbour's would decide over the distance.
// The new row is gamma (e_k - sum z_j F_j), gamma the inverse of the distance. Since the residual
// is orthogonal to the earlier atoms, its component along the new direction is gamma times the
// product with d, which the decision has computed: the coefficients move by component * row, the
// residual by as much of each atom.
#pragma once

#include "lexico/cuda/atom_rows.cuh"
#include "lexico/cuda/encode_finish.cuh"

namespace kvcore::lexico {

/// A warp's shared memory: what has an element for each atom, or for each pair.
struct StepMemory {
  double* inverse;   // [inverse_stride(sparsity)]
  double* products;  // [sparsity] of the new atom with those before
  double* z;         // [sparsity]
  double* change;    // [sparsity] of the coefficients
  int* atoms;        // [sparsity] rounded up to an even number

  static __device__ __forceinline__ StepMemory at(unsigned char* smem, int sparsity) {
    double* const inverse = reinterpret_cast<double*>(smem);
    double* const products = inverse + inverse_stride(sparsity);
    return {inverse, products, products + sparsity, products + 2 * sparsity,
            reinterpret_cast<int*>(products + 3 * sparsity)};
  }
};
constexpr int step_memory_bytes(int sparsity) {
  const int bytes = 8 * (inverse_stride(sparsity) + 3 * sparsity) + 4 * sparsity;
  return (bytes + 15) / 16 * 16;
}
// keep_slots has the first bytes of the block's shared memory.
constexpr int kStepBase = 32;
static_assert((kStepWarps + 1) * sizeof(int) <= kStepBase);
constexpr int step_smem_bytes(int sparsity) {
  return kStepBase + kStepWarps * step_memory_bytes(sparsity);
}
static_assert(step_smem_bytes(kMaxSparsity) <= kPortableSmemBytes);

/// The sum over all lanes of each of four values: of value v in the lanes 8 * v to 8 * v + 7. The
/// order of each sum is that of warp_sum.
__device__ __forceinline__ float sum_four(const float (&x)[4], int lane) {
  const bool upper = (lane & 16) != 0, odd = (lane & 8) != 0;
  float halves[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float sent = upper ? x[i] : x[i + 2];
    halves[i] = (upper ? x[i + 2] : x[i]) + __shfl_xor_sync(kAllLanes, sent, 16);
  }
  const float sent = odd ? halves[0] : halves[1];
  const float sum = (odd ? halves[1] : halves[0]) + __shfl_xor_sync(kAllLanes, sent, 8);
  return warp_sum<8>(sum);
}

/// Products of an atom with the `count` selected ones, into m.products. Given the Gram matrix they
/// are looked up.
template <int kQuads>
__device__ __forceinline__ void multiply_atoms(const EncodeParams& p, const StepMemory& m, int atom,
                                               const Row<kQuads>& row, int count, int lane) {
  if (p.gram != nullptr) {
    for (int j = lane; j < count; j += kWarpSize) {
      m.products[j] = static_cast<double>(p.gram[int64_t{atom} * p.atoms + m.atoms[j]]);
    }
    return;
  }
  const int head_dim = static_cast<int>(p.head_dim);
  for (int first = 0; first < count; first += 4) {
    float parts[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      // Past the end a row is loaded again: four loads are on their way without a branch.
      const int other = m.atoms[min(first + i, count - 1)];
      parts[i] =
          dot_part(row, load_row<kQuads>(p.dictionary + int64_t{other} * head_dim, head_dim, lane));
    }
    const float sum = sum_four(parts, lane);
    const int j = first + lane / 8;
    if (lane % 8 == 0 && j < count) m.products[j] = static_cast<double>(sum);
  }
}

/// Adds an atom whose products are in m.products to the factor, its row of the inverse at the end
/// of m.inverse; false, without that, if it lies in the span of the others. `norm_squared` is its
/// own, `product` its product with the residual; m.change becomes what all coefficients change by.
__device__ __forceinline__ bool append_atom(const StepMemory& m, int count, double norm_squared,
                                            double product, int lane) {
  // Two rows or columns a lane; the rows of a triangle begin in different banks.
  double squares = 0;
  for (int j = lane; j < count; j += kWarpSize) {
    const double* row = m.inverse + triangle(j);
    double sum = 0;
    for (int i = 0; i <= j; ++i) sum = __fma_rn(row[i], m.products[i], sum);
    m.z[j] = sum;
    squares = __fma_rn(sum, sum, squares);
  }
  const double distance = norm_squared - warp_sum(squares);
  if (!(distance > kMinDistanceSquared)) return false;
  __syncwarp();
  const double gamma = inverse_sqrt(distance);
  const double component = gamma * product;
  double* const row = m.inverse + triangle(count);
  for (int i = lane; i < count; i += kWarpSize) {
    double sum = 0;
    for (int j = i; j < count; ++j) sum = __fma_rn(m.z[j], m.inverse[triangle(j) + i], sum);
    row[i] = -gamma * sum;
    m.change[i] = component * row[i];
  }
  if (lane == 0) {
    row[count] = gamma;
    m.change[count] = component * gamma;
  }
  __syncwarp();
  return true;
}

/// The better one of the two candidates in fp32, the first of equal ones, and its product with the
/// residual; atom -1 if there is none.
template <int kQuads>
struct Choice {
  int atom;
  float product;
  Row<kQuads> row;
};
template <int kQuads>
__device__ __forceinline__ Choice<kQuads> choose(const EncodeParams& p, const Candidates& found,
                                                 const Row<kQuads>& residual, int lane) {
  const int head_dim = static_cast<int>(p.head_dim);
  Choice<kQuads> choices[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    choices[i].atom = atom_of(found.key[i]);
    // In the place of none a row that is there: both loads are on their way together.
    const int64_t atom = max(choices[i].atom, 0);
    choices[i].row = load_row<kQuads>(p.dictionary + atom * head_dim, head_dim, lane);
    choices[i].product = warp_sum(dot_part(choices[i].row, residual));
  }
  const float first = fabsf(choices[0].product), second = fabsf(choices[1].product);
  const bool is_second = choices[1].atom >= 0 &&
                         (second > first || (second == first && choices[1].atom < choices[0].atom));
  return is_second ? choices[1] : choices[0];
}

/// The candidates of row `at` of the list, those of all parts merged.
__device__ __forceinline__ Candidates candidates_of(const EncodeArgs& args,
                                                    const SearchItems& items, int at, int lane) {
  const int tile = at / kSelectRows, row = at % kSelectRows;
  Candidates found{{0, 0}};
  for (int part = lane; part < items.num_parts; part += kWarpSize) {
    found = merge(found, args.candidates[int64_t{items.item(tile, part)} * kSelectRows + row]);
  }
#pragma unroll
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
    found = merge_with_lane(found, distance);
  }
  return found;
}

/// One step of one vector; true if it is not done. Its code has `step` atoms before.
template <int kQuads>
__device__ inline bool step_vector(const EncodeArgs& args, const SearchItems& items, int step,
                                   int at, int slot, const StepMemory& m, int lane) {
  const EncodeParams& p = args.p;
  const int sparsity = static_cast<int>(p.sparsity), head_dim = static_cast<int>(p.head_dim);
  const int64_t vector_idx = args.first_vector + slot;
  int16_t* const indices = p.indices + vector_idx * sparsity;
  double* const inverse = args.inverse + int64_t{slot} * inverse_stride(sparsity);
  double* const values = args.values + int64_t{slot} * sparsity;
  for (int i = lane; 2 * i < triangle(step); i += kWarpSize) {
    cp_async_16(m.inverse + 2 * i, inverse + 2 * i);
  }
  cp_async_commit();
  for (int j = lane; j < step; j += kWarpSize) m.atoms[j] = indices[j];
  const Slot facts = args.slots[slot];
  float* const residual_row = args.residuals + int64_t{slot} * head_dim;
  Row<kQuads> residual = load_row<kQuads>(residual_row, head_dim, lane);
  const Choice<kQuads> best = choose(p, candidates_of(args, items, at, lane), residual, lane);
  cp_async_wait<0>();
  __syncwarp();

  const double product = best.product;
  bool is_done = best.atom < 0 ||
                 product * product <= kStopCorrelation * kStopCorrelation * facts.norm_squared;
  int count = step;
  if (!is_done) {
    multiply_atoms(p, m, best.atom, best.row, count, lane);
    __syncwarp();
    const double norm_squared = warp_sum(dot_part(best.row, best.row));
    is_done = !append_atom(m, count, norm_squared, product, lane);
  }
  if (!is_done) {
#pragma unroll 4
    for (int j = 0; j < count; ++j) {
      const float* atom = p.dictionary + int64_t{m.atoms[j]} * head_dim;
      add_row(residual, static_cast<float>(-m.change[j]), load_row<kQuads>(atom, head_dim, lane));
    }
    add_row(residual, static_cast<float>(-m.change[count]), best.row);
    if (lane == 0) indices[count] = static_cast<int16_t>(best.atom);
    ++count;
  }
  const double energy = norm_squared(residual), tolerance = p.tolerance;
  is_done = is_done || count == sparsity || energy <= tolerance * tolerance * facts.norm_squared;

  LaneCoefficients coefficients{.values = {0, 0}, .exponent = facts.exponent, .finite = true};
  for (int i = 0; i < 2; ++i) {
    const int j = lane + kWarpSize * i;
    if (j >= count) continue;
    const double before = j < step ? values[j] : 0;
    coefficients.values[i] = count > step ? before + m.change[j] : before;
  }
  if (is_done) {
    const double share = energy * reciprocal(facts.norm_squared);  // the latter is at least 1
    const double relative = share < 0x1p-100 ? 0 : share * inverse_sqrt(share);
    finish_vector(p, vector_idx, count, coefficients, static_cast<float>(relative), lane);
    return false;
  }
  for (int i = 0; i < 2; ++i) {
    const int j = lane + kWarpSize * i;
    if (j < count) values[j] = coefficients.values[i];
  }
  for (int i = lane; i < count; i += kWarpSize) {
    inverse[triangle(step) + i] = m.inverse[triangle(step) + i];
  }
  store_row(residual, residual_row, args.rounded + int64_t{slot} * head_dim, head_dim, lane);
  return true;
}

template <int kQuads>
__global__ void __launch_bounds__(kStepWarps* kWarpSize, step_ctas(kQuads))
    encode_step_kernel(const __grid_constant__ EncodeArgs args, int step) {
  const int num_active = args.counts[step];
  if (static_cast<int>(blockIdx.x) * kStepWarps >= num_active) return;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int at = static_cast<int>(blockIdx.x) * kStepWarps + warp;
  const int sparsity = static_cast<int>(args.p.sparsity);
  unsigned char* const smem = dynamic_smem();
  const StepMemory m =
      StepMemory::at(smem + kStepBase + warp * step_memory_bytes(sparsity), sparsity);
  int slot = 0;
  bool is_kept = false;
  if (at < num_active) {
    slot = args.lists[step % 2][at];
    is_kept = step_vector<kQuads>(args, SearchItems(args, num_active), step, at, slot, m, lane);
  }
  keep_slots(args, step + 1, slot, is_kept, reinterpret_cast<int*>(smem));
}

}  // namespace kvcore::lexico
