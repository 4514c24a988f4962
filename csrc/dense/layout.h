// Sizes that exact attention takes: the single home of its constants.
#pragma once

namespace kvcore::dense {

constexpr int kMaxHeadDim = 256;
constexpr int kHeadDimMultiple = 16;

}  // namespace kvcore::dense
