// A row of the Gram matrix with a byte an atom, which is what a search reads while that is enough:
// half of what comes from memory. For code that is compiled per ISA level.
//
// Word i of a vector has atom i of kPairAtoms in its low byte and atom kWords + i in the high one.
// The low byte in the place of the high one, and the word as it is, are the products within
// kCoarse: the high byte was rounded with regard to the low one. A row is multiplied by what makes
// its largest product kCoarseMax, but for the one with its own atom.
#pragma once

#include "core/cpu/words.h"
#include "lexico/cpu/encode_kernels.h"

namespace kvcore::lexico::KVCORE_ISA {

using namespace ::kvcore::KVCORE_ISA;

constexpr int kCoarse = 128;
constexpr int kCoarseMax = 0x7fff - kCoarse;
// No larger factor: coefficients are divided by it.
constexpr float kMaxFactor = 64;
constexpr int kPairAtoms = 2 * kWords;
static_assert(kAtomAlignment % kPairAtoms == 0);

/// Products of a row with the first kWords of kPairAtoms atoms, and the others.
struct Products {
  Bytes low, high;
};

inline Products load_coarse(const int16_t* row, int64_t n) {
  const Bytes words = load_bytes(row + n / 2);
  return {raise_bytes(words), words};
}

/// Products of at most kCoarseMax.
inline void store_coarse(int16_t* row, int64_t n, const Products& products) {
  const Bytes half = splat_word(kCoarse), byte = splat_word(0xff);
  const Bytes low = and_bytes(high_bytes(add_words(products.low, half)), byte);
  const Bytes high = high_bytes(add_words(sub_words(products.high, low), half));
  store_bytes(row + n / 2, or_bytes(raise_bytes(high), low));
}

/// One product as a search reads it.
inline int16_t coarse_product(const int16_t* row, int64_t atom) {
  const int64_t word = atom % kPairAtoms, n = atom - word;
  int16_t words[kPairAtoms];
  const Products products = load_coarse(row, n);
  store_bytes(words, products.low);
  store_bytes(words + kWords, products.high);
  return words[word];
}

}  // namespace kvcore::lexico::KVCORE_ISA
