// What kernels found wrong in device tensors, where the host could not look without waiting.
//
// A kernel that meets such a value skips it, touches no memory through it, gives NaN where its
// result would have gone, and sets a bit; kvcore.check_errors() raises them later.
#pragma once

#include <cstdint>

namespace kvcore {

enum ErrorFlag : uint32_t {
  kErrorBlockTable = 1u << 0,
  kErrorSeqLens = 1u << 1,
  kErrorCuSeqlens = 1u << 2,
  kErrorLeftPadding = 1u << 3,
  kErrorNewLens = 1u << 4,
  kErrorIndices = 1u << 5,
  kErrorStateIndices = 1u << 6,
  kErrorNumAccepted = 1u << 7,
  kErrorTailLens = 1u << 8,
  kErrorBufferLens = 1u << 9,
  kErrorCodes = 1u << 10,
};

struct ErrorText {
  ErrorFlag flag;
  const char* text;
};
constexpr ErrorText kErrorTexts[] = {
    {kErrorBlockTable, "block_table: an entry that is needed names no block of the pool"},
    {kErrorSeqLens, "seq_lens: a length is negative or more than the store holds"},
    {kErrorCuSeqlens, "cu_seqlens: not rising from 0 to the number of tokens"},
    {kErrorLeftPadding, "left_padding: negative or more than the number of tokens"},
    {kErrorNewLens, "new_lens: negative or more than seq_lens"},
    {kErrorIndices, "indices: out of range"},
    {kErrorStateIndices, "state_indices: no slot of the pool, or a slot that is named twice"},
    {kErrorNumAccepted, "num_accepted: less than 1 or more than the columns of state_indices"},
    {kErrorTailLens,
     "tail_lens: a length is negative, or more than the tails hold with new tokens"},
    {kErrorBufferLens, "buffer_lens: a length is negative or more than the buffers hold"},
    {kErrorCodes, "blocks or tails: not codes over so many atoms, as append and seal make them"},
};

// ---- Each library (kvcore_cpu, kvcore_cuda, kvcore_simt) defines these for itself.

/// True if the host may look at the values of device tensors for nothing; then they are always
/// checked. Otherwise a look costs a copy and a synchronisation, and only check_values pays it.
extern const bool kHostReadsValues;

/// Waits for the current device, returns the bits that were set there and clears them. The CPU's
/// kernels raise at once and set none.
uint32_t take_error_flags();

}  // namespace kvcore
