// lexico_encode on CUDA: chunks of vectors, each loaded by one launch and taken through all its
// steps by two launches a step. The host reads nothing back: a list of the vectors that are not
// done is kept on the device, and launches that find it empty end at once.
#include "core/cuda/grid.h"
#include "core/cuda/launch.cuh"
#include "core/cuda/scratch.h"
#include "core/dispatch.h"
#include "lexico/cuda/dictionary.h"
#include "lexico/cuda/encode_launch.h"
#include "lexico/cuda/encode_load_kernel.cuh"
#include "lexico/cuda/encode_pack_kernel.cuh"

namespace kvcore::lexico {
namespace {

/// Parts of one allocation, each aligned to 256 bytes.
class Parts {
 public:
  /// The offset of the next part.
  int64_t add(std::initializer_list<int64_t> factors) {
    const int64_t offset = size_;
    size_ += (byte_count(factors) + 255) / 256 * 256;
    return offset;
  }
  int64_t size() const { return size_; }

 private:
  int64_t size_ = 0;
};

/// Bytes that a vector in work takes.
int64_t state_bytes(const EncodeParams& p) {
  const int sparsity = static_cast<int>(p.sparsity);
  const int64_t rows = p.head_dim * static_cast<int64_t>(sizeof(float) + sizeof(BFloat16));
  return rows + 8 * int64_t{inverse_stride(sparsity) + sparsity} + sizeof(Slot) + 2 * sizeof(int);
}

void pack(const EncodeArgs& args) {
  const int64_t size = int64_t{args.num_stages} * stage_bytes(static_cast<int>(args.p.head_dim)) /
                       static_cast<int64_t>(sizeof(uint4));
  launch(encode_pack_kernel, dim3(grid_of((size + kPackThreads - 1) / kPackThreads)),
         dim3(kPackThreads), 0, current_stream(), args);
}

void encode_chunk(const EncodeArgs& args) {
  const int64_t blocks = (args.num_vectors + kStepWarps - 1) / kStepWarps;
  launch(encode_load_kernel, dim3(grid_of(blocks)), dim3(kStepWarps * kWarpSize), kLoadBytes,
         current_stream(), args, device_rows(args.p.x));
  for (int step = 0; step < args.p.sparsity; ++step) {
    dispatch<64, 96, 128, 256>("head_dim", args.p.head_dim, [&](auto head_dim) {
      launch_encode_select<head_dim()>(args, step);
      launch_encode_step<(head_dim() + 127) / 128>(args, step);
    });
  }
}

}  // namespace

namespace backend {

void encode(const EncodeParams& p) {
  const EncodePlan plan = encode_plan(p, device_properties().sm_count, state_bytes(p));
  const int sparsity = static_cast<int>(p.sparsity);
  const int64_t counts_of_chunk = p.sparsity + 1;
  Parts parts;
  const int64_t fragments = parts.add({plan.num_stages, stage_bytes(static_cast<int>(p.head_dim))});
  const int64_t residuals = parts.add({plan.capacity, p.head_dim, sizeof(float)});
  const int64_t rounded = parts.add({plan.capacity, p.head_dim, sizeof(BFloat16)});
  const int64_t inverse = parts.add({plan.capacity, inverse_stride(sparsity), sizeof(double)});
  const int64_t values = parts.add({plan.capacity, p.sparsity, sizeof(double)});
  const int64_t slots = parts.add({plan.capacity, sizeof(Slot)});
  const int64_t lists[2] = {parts.add({plan.capacity, sizeof(int)}),
                            parts.add({plan.capacity, sizeof(int)})};
  const int64_t counts = parts.add({plan.num_chunks, counts_of_chunk, sizeof(int)});
  const int64_t candidates = parts.add({plan.select_ctas, kSelectRows, sizeof(Candidates)});
  const Scratch scratch(parts.size());
  const AlignedDictionary dictionary(p.dictionary, p.atoms, p.head_dim);
  const auto at = [&]<class T>(int64_t offset, T*& pointer) {
    pointer = reinterpret_cast<T*>(scratch.data() + offset);
  };
  EncodeArgs args = {};
  args.p = p;
  args.p.dictionary = dictionary.data();
  at(fragments, args.fragments);
  at(residuals, args.residuals);
  at(rounded, args.rounded);
  at(inverse, args.inverse);
  at(values, args.values);
  at(slots, args.slots);
  for (int i = 0; i < 2; ++i) at(lists[i], args.lists[i]);
  at(counts, args.counts);
  at(candidates, args.candidates);
  args.num_counts = plan.num_chunks * counts_of_chunk;
  args.num_stages = static_cast<int>(plan.num_stages);
  args.resident_ctas = static_cast<int>(plan.resident_ctas);
  args.select_ctas = static_cast<int>(plan.select_ctas);
  pack(args);
  for (int64_t chunk = 0; chunk < plan.num_chunks; ++chunk) {
    args.first_vector = chunk * plan.capacity;
    args.num_vectors = std::min(plan.capacity, plan.num_vectors - args.first_vector);
    encode_chunk(args);
    args.counts += counts_of_chunk;
  }
}

}  // namespace backend
}  // namespace kvcore::lexico
