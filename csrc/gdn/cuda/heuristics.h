// How the kernels of the family are launched, and why. Nothing here was measured on a GPU: the
// figures are counts of bytes, registers and CTAs (README, "CUDA"). Results do not depend on them.
#pragma once

#include <cstdint>

namespace kvcore::gdn {

// ---- Chunked scan

// A CTA of the first kernel: a warp for each 16 of a chunk's 64 tokens.
constexpr int kSolveThreads = 128;
// CTAs that the registers leave room for on a multiprocessor, to hide each other's barriers: two
// triangles of sums in each thread, and with 168 registers, for three, they would spill.
constexpr int kSolveCtas = 2;

// Value channels of a warp of the second kernel: the rows of one matrix instruction. With 32, each
// element of k, q, A and P would be read from shared memory half as often, but a head of 128
// channels would be four warps instead of eight, and it is the length of a warp's chain of products
// that a long sequence waits for.
constexpr int kWarpColumns = 16;
// Warps of a CTA: one for each scheduler of a multiprocessor. They share what they read of a chunk,
// 76 KiB at k_dim 128 in bf16.
constexpr int kStateWarps = 4;
constexpr int kStateThreads = 32 * kStateWarps;
constexpr int kSliceColumns = kStateWarps * kWarpColumns;
// Steps in shared memory: one is used while two arrive. More would not fit 99 KiB with fp32.
constexpr int kStateSlots = 3;

// ---- Recurrent step

// Value channels of a CTA: rows of 128 bytes of a state with keys first, whole lines. A state of
// 128 x 128 is then four CTAs of 16 KiB, so that even one sequence of 32 heads is 128 CTAs, one for
// each of an H200's 132 multiprocessors.
constexpr int kStepColumns = 32;
// Four warps hold those 16 KiB in 32 registers of a thread: what is loaded needs no other place.
constexpr int kStepThreads = 128;
// Tokens in shared memory at once: as many as speculation verifies.
constexpr int kStepTokens = 8;
// Floats of the state in a thread, over the 4 of a load, for a k_dim of up to 128 or 256.
constexpr int step_loads(int64_t k_dim) { return k_dim <= 128 ? 8 : 16; }
// CTAs that the registers leave room for on a multiprocessor. An H200 delivers 21 bytes a cycle to
// each of them, some 40 KiB in the time that memory takes to answer. With 5 CTAs of 16 KiB (96
// registers a thread), or 3 of 32 KiB (168), twice as much is on its way while others compute or
// write; one more of either would spill.
constexpr int step_ctas(int loads) { return loads <= 8 ? 5 : 3; }

// ---- Causal convolution

// A warp reads 32 x 4 channels of a token, 256 bytes in 16 bits: whole lines.
constexpr int kConvThreads = 128;
// Tokens of a thread: the width - 1 tokens before them are read again, 5 % of the traffic, most of
// it from the second-level cache. 4,096 tokens of 8,192 channels are 1,024 CTAs.
constexpr int kConvTokens = 64;
// Rows that a thread has on their way: 8 bytes each, 128 KiB of a multiprocessor's 2,048 threads.
constexpr int kConvAhead = 8;

// ---- RMSNorm

// A head of 128 channels is a warp's: 4 to a lane, and nothing to wait for but shuffles.
constexpr int kNormThreads = 256;
constexpr int kNormWarps = kNormThreads / 32;
// Longer rows are a CTA's: a warp would go through a row of 1,024 channels in 8 steps.
constexpr int kNormWarpChannels = 1024;
// CTAs of the backward that the registers leave room for on a multiprocessor: with 64, for four,
// some of the kernels would spill.
constexpr int kNormBackwardCtas = 3;
// CTAs of the backward in all, each of which adds up its rows' gradient of the weight: some 8 for
// each multiprocessor of an H200. Their sums are read again, 4 bytes a channel, so that they are to
// be few. The rows of a CTA follow from their number alone, so that every device adds in the same
// order.
constexpr int64_t kNormMaxCtas = 1024;
constexpr int64_t norm_cta_rows(int64_t num_rows, int64_t channels) {
  const int64_t at_once = channels <= kNormWarpChannels ? kNormWarps : 1;
  const int64_t rounds = (num_rows + kNormMaxCtas * at_once - 1) / (kNormMaxCtas * at_once);
  return rounds * at_once;
}
// 32 channels of all CTAs' sums are a CTA's: 64 of 1,024 for each of its warps.
constexpr int kNormSumThreads = 512;

// ---- Backward of the chunked scan

// A warp for each 16 tokens of a chunk, or 16 value channels of a state.
constexpr int kBackwardThreads = 128;
// Squares of 18 KiB in shared memory. The serial kernels use one or two while the others are on
// their way: a chunk is six (states) or ten (gradients) of them at k_dim 128. The parallel kernel
// keeps two of its own beside three.
constexpr int kBackwardStateSlots = 5;
// CTAs of the serial kernels that shared memory leaves room for on an H200: the registers must not
// be cut to more, which spills.
constexpr int kBackwardCtas = 2;
constexpr int kGradientSlots = 3;
constexpr int kGateSumThreads = 256;

// A window of chunks whose states are kept: enough for the parallel kernel to fill the device
// kBackwardWaves times with the one CTA of a multiprocessor that shared memory is sure to have room
// for, as long as that is not more memory than kBackwardBytes. Windows cost a second pass over the
// states, and nothing else: states go from one to the next in fp32.
constexpr int64_t kBackwardWaves = 8;
constexpr int64_t kBackwardBytes = int64_t{1} << 30;
constexpr int64_t backward_window(int64_t num_slots, int64_t slot_bytes, int64_t k_heads,
                                  int sm_count) {
  const int64_t wanted = (kBackwardWaves * sm_count + k_heads - 1) / k_heads;
  const int64_t fitting = kBackwardBytes / slot_bytes;
  const int64_t slots = wanted < fitting ? wanted : fitting;
  return slots < 1 ? 1 : slots < num_slots ? slots : num_slots < 1 ? 1 : num_slots;
}

}  // namespace kvcore::gdn
