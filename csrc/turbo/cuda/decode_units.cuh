// How a warp of the decode kernel brings pages into shared memory: as units of a K or a V block, a
// few of them always on their way.
//
// An 8-bit block is two units, K by channels and V by channels, so that every unit fits a slot that
// is little more than a 4-bit block: a slot for whole 8-bit blocks would be twice as large, and of
// most of them the half would be empty.
#pragma once

#include "core/cuda/recompute.cuh"
#include "turbo/cuda/fragments.cuh"

namespace kvcore::turbo {

enum class UnitKind : int {
  kMissingK,  // the table names no block
  kK8First,
  kK8Second,
  kK4,
  kK2,
  kMissingV,
  kV8First,
  kV8Second,
  kV4,
  kV2
};

/// Sizes of the units of a head_dim. A unit is [start of the block up to its codes][rows of codes],
/// the second part of an 8-bit block without the former but with its place.
template <int kHeadDim>
struct UnitLayout {
  static constexpr int kChunks = kHeadDim / kChunk;
  static constexpr int kFirstChunks = (kChunks + 1) / 2;  // of an 8-bit block, in its first unit
  static constexpr int kV8Stride = v_row_stride(kFirstChunks * kChunk);
  static constexpr int kVStride = v_row_stride(kHeadDim);

  static constexpr int prefix(int bits) { return static_cast<int>(code_offset(bits, kHeadDim)); }
  static constexpr int k_bytes(int bits) {
    const int rows = bits == 8 ? kFirstChunks * 8 : k_rows(bits, kHeadDim);
    return prefix(bits) + rows * k_row_stride(bits);
  }
  static constexpr int v_bytes(int bits) {
    return prefix(bits) + v_rows(bits) * (bits == 8 ? kV8Stride : kVStride);
  }
  static constexpr int largest() {
    int bytes = 0;
    for (const int bits : {8, 4, 2}) {
      bytes = bytes < k_bytes(bits) ? k_bytes(bits) : bytes;
      bytes = bytes < v_bytes(bits) ? v_bytes(bits) : bytes;
    }
    return (bytes + 15) / 16 * 16;
  }
  static constexpr int kSlotBytes = largest();

  template <int kBits>
  static __device__ void copy_prefix(uint8_t* slot, const uint8_t* block, unsigned lane) {
    for (unsigned i = lane * 16; i < prefix(kBits); i += kWarpSize * 16) {
      cp_async_16(slot + i, block + i);
    }
  }
  template <int kBits>
  static __device__ void copy_k(uint8_t* slot, const uint8_t* block, unsigned lane) {
    constexpr int kBytes = k_row_bytes(kBits);
    copy_prefix<kBits>(slot, block, lane);
    copy_rows<k_rows(kBits, kHeadDim), kBytes, k_row_stride(kBits), kBytes, kWarpSize>(
        slot + prefix(kBits), block + prefix(kBits), lane);
  }
  template <int kBits>
  static __device__ void copy_v(uint8_t* slot, const uint8_t* block, unsigned lane) {
    constexpr int kBytes = kHeadDim * kInterleave;
    copy_prefix<kBits>(slot, block, lane);
    copy_rows<v_rows(kBits), kBytes, kVStride, kBytes, kWarpSize>(slot + prefix(kBits),
                                                                  block + prefix(kBits), lane);
  }
  /// Chunks of channels [kBegin, kEnd) of an 8-bit block.
  template <int kBegin, int kEnd>
  static __device__ void copy_k8(uint8_t* slot, const uint8_t* block, unsigned lane) {
    constexpr int kBytes = k_row_bytes(8);
    if constexpr (kBegin == 0) copy_prefix<8>(slot, block, lane);
    copy_rows<(kEnd - kBegin) * 8, kBytes, k_row_stride(8), kBytes, kWarpSize>(
        slot + prefix(8), block + prefix(8) + kBegin * 8 * kBytes, lane);
  }
  template <int kBegin, int kEnd>
  static __device__ void copy_v8(uint8_t* slot, const uint8_t* block, unsigned lane) {
    if constexpr (kBegin == 0) copy_prefix<8>(slot, block, lane);
    copy_rows<v_rows(8), (kEnd - kBegin) * kChunk * kInterleave, kV8Stride, kHeadDim * kInterleave,
              kWarpSize>(slot + prefix(8), block + prefix(8) + kBegin * kChunk * kInterleave, lane);
  }

  static __device__ void copy(UnitKind kind, uint8_t* slot, const uint8_t* block, unsigned lane) {
    lane = static_cast<unsigned>(recompute(static_cast<int>(lane)));
    switch (kind) {
      case UnitKind::kMissingK:
      case UnitKind::kMissingV:
        return;
      case UnitKind::kK8First:
        return copy_k8<0, kFirstChunks>(slot, block, lane);
      case UnitKind::kK8Second:
        return copy_k8<kFirstChunks, kChunks>(slot, block, lane);
      case UnitKind::kK4:
        return copy_k<4>(slot, block, lane);
      case UnitKind::kK2:
        return copy_k<2>(slot, block, lane);
      case UnitKind::kV8First:
        return copy_v8<0, kFirstChunks>(slot, block, lane);
      case UnitKind::kV8Second:
        return copy_v8<kFirstChunks, kChunks>(slot, block, lane);
      case UnitKind::kV4:
        return copy_v<4>(slot, block, lane);
      case UnitKind::kV2:
        return copy_v<2>(slot, block, lane);
    }
  }
};

/// A block's address with its width in the low bits, which the address does not need; 0: no block.
using BlockRef = unsigned long long;
__device__ inline BlockRef block_ref(const uint8_t* block, int bits) {
  return reinterpret_cast<BlockRef>(block) | static_cast<BlockRef>(bits);
}
constexpr int ref_bits(BlockRef ref) { return static_cast<int>(ref & 15); }
__device__ inline const uint8_t* ref_block(BlockRef ref) {
  return reinterpret_cast<const uint8_t*>(ref & ~BlockRef{15});
}

/// The units of pages first, first + stride, ... (num_pages of them) of a warp, K before V, through
/// kSlots slots of shared memory of which the warp reads one and the others are filled.
template <int kHeadDim, int kSlots, class Lookup>
class UnitPipeline {
 public:
  using Layout = UnitLayout<kHeadDim>;

  /// lookup(page, kv): the BlockRef of a page; called by all lanes, each with its own page.
  /// slots: [kSlots * kSlotBytes]; kinds: [kSlots], both the warp's own.
  __device__ UnitPipeline(const Lookup& lookup, uint8_t* slots, UnitKind* kinds, int64_t first,
                          int stride, int num_pages)
      : lookup_(lookup),
        slots_(slots),
        kinds_(kinds),
        first_(first),
        stride_(stride),
        num_pages_(num_pages),
        lane_(static_cast<int>(threadIdx.x) % kWarpSize) {
    for (int i = 0; i < kSlots - 1; ++i) issue();
  }

  struct Unit {
    const uint8_t* data;
    UnitKind kind;
  };

  /// The next unit; what the one before it was in is overwritten.
  __device__ Unit next() {
    cp_async_wait<kSlots - 2>();
    __syncwarp();  // all lanes see the unit, and are done with the one before it
    issue();
    const Unit unit = {slots_ + read_ * Layout::kSlotBytes, kinds_[read_]};
    read_ = read_ + 1 == kSlots ? 0 : read_ + 1;
    return unit;
  }

 private:
  __device__ void issue() {
    if (page_ < num_pages_) {
      const int turn = page_ % kWarpSize;
      if (turn == 0 && part_ == 0) look_up();
      // parts: 0, 1 of K, then 2, 3 of V
      const BlockRef ref = __shfl_sync(kAllLanes, part_ < 2 ? k_refs_ : v_refs_, turn);
      const int bits = ref_bits(ref);
      const UnitKind kind = kind_of(bits);
      if (lane_ == 0) kinds_[write_] = kind;
      Layout::copy(kind, slots_ + write_ * Layout::kSlotBytes, ref_block(ref),
                   static_cast<unsigned>(lane_));
      part_ += bits == 8 ? 1 : 2;
      if (part_ == 4) {
        part_ = 0;
        ++page_;
      }
    }
    // Also without a copy, so that a unit's group is always as many groups back.
    cp_async_commit();
    write_ = write_ + 1 == kSlots ? 0 : write_ + 1;
  }

  __device__ UnitKind kind_of(int bits) const {
    const bool is_k = part_ < 2;
    switch (bits) {
      case 8:
        if (part_ % 2 == 0) return is_k ? UnitKind::kK8First : UnitKind::kV8First;
        return is_k ? UnitKind::kK8Second : UnitKind::kV8Second;
      case 4:
        return is_k ? UnitKind::kK4 : UnitKind::kV4;
      case 2:
        return is_k ? UnitKind::kK2 : UnitKind::kV2;
      default:
        return is_k ? UnitKind::kMissingK : UnitKind::kMissingV;
    }
  }

  /// Of the next 32 pages, one for each lane: the table is read once for all of them.
  __device__ void look_up() {
    const int page = page_ + lane_;
    k_refs_ = v_refs_ = 0;
    if (page < num_pages_) {
      k_refs_ = lookup_(first_ + static_cast<int64_t>(page) * stride_, 0);
      v_refs_ = lookup_(first_ + static_cast<int64_t>(page) * stride_, 1);
    }
  }

  const Lookup& lookup_;
  uint8_t* slots_;
  UnitKind* kinds_;
  int64_t first_;
  int stride_, num_pages_, lane_;
  int page_ = 0, part_ = 0;  // of the next unit to be copied
  int write_ = 0, read_ = 0;
  BlockRef k_refs_ = 0, v_refs_ = 0;
};

}  // namespace kvcore::turbo
