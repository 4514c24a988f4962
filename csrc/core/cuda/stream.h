// The stream of the op that is running, for files that are not compiled by nvcc too.
#pragma once

namespace kvcore {

/// The cudaStream_t that torch has current on the current device, which the op layer has made the
/// device of the op's tensors (binding/register.h). Defined in csrc/binding/cuda.
void* current_stream_handle();

}  // namespace kvcore
