// Sizes of the gated delta rule's chunks and limits: the single home of its constants.
#pragma once

namespace kvcore::gdn {

constexpr int kChunk = 64;             // tokens solved together; counted from a sequence's start
constexpr int kMaxHeadDim = 256;       // of keys and of values
constexpr int kHeadDimMultiple = 16;   // of keys and of values
constexpr float kNormEpsilon = 1e-6f;  // of the L2 norm of q and k
constexpr float kSoftplusThreshold = 20.0f;  // softplus(x) is x beyond
constexpr int kMinConvWidth = 2;
constexpr int kMaxConvWidth = 4;
constexpr int kMaxNormChannels = 16384;  // sums of a row's gradients fit a CTA's shared memory

}  // namespace kvcore::gdn
