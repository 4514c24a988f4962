// Layout of sparse codes and of the store that holds them: the single home of its constants.
//
// The *code* of a vector is `sparsity` pairs of an atom's index and a coefficient, and one scale:
//
//   x  ~  scale * sum_j coefficients[j] * dictionary[indices[j]]
#pragma once

#include <cstdint>

namespace kvcore::lexico {

constexpr int kMaxHeadDim = 256;
constexpr int kMaxSparsity = 64;
constexpr int kMaxAtoms = 32768;      // an index is an int16 that is not negative
constexpr int kCoefficientMax = 127;  // largest int8 coefficient
constexpr int kE4M3Max = 448;         // largest E4M3 coefficient

// Matching pursuit stops when no atom is correlated with the residual more than this times the norm
// of the vector: what remains is rounding of fp32.
constexpr double kStopCorrelation = 0x1p-20;
// It also stops when the selected atom is so close to the span of those before it: the squared
// distance of the unit atom from the span. Beyond it the coefficients are rounding.
constexpr double kMinDistanceSquared = 0x1p-16;
// Matching pursuit takes the norm of an atom for 1: dictionaries further off are rejected.
constexpr double kNormTolerance = 1e-4;

}  // namespace kvcore::lexico
