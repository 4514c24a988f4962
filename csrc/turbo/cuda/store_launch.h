// Launches for one element type of their inputs or outputs; each is compiled in instances/.
#pragma once

#include <cstdint>

#include "turbo/params.h"

namespace kvcore::turbo {

struct ScanArguments;

template <class T>
void launch_scan(const ScanArguments& a, int64_t heads);
template <class T>
void launch_append(const AppendParams& p);
template <class T>
void launch_dequantize(const DequantizeParams& p);

}  // namespace kvcore::turbo
