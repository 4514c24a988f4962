// The op behind kvcore.check_errors().
#include <stdexcept>
#include <string>

#include "binding/check.h"
#include "binding/register.h"
#include "core/error_flags.h"

namespace kvcore::binding {

void raise_errors(const Tensor& like) {
  const uint32_t flags = take_error_flags();
  if (flags == 0) return;
  std::string message = "kvcore: kernels on " + format_device(like) + " found";
  const char* separator = " ";
  for (const ErrorText& error : kErrorTexts) {
    if ((flags & error.flag) == 0) continue;
    message += separator + std::string(error.text);
    separator = "; ";
  }
  throw std::runtime_error(message);
}

}  // namespace kvcore::binding

STABLE_TORCH_LIBRARY_IMPL(KVCORE_LIBRARY, KVCORE_DISPATCH_KEY, m) {
  m.impl("raise_errors", KVCORE_OP(kvcore::binding::raise_errors));
}
