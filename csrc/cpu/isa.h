// The choice of an instruction set at run time.
#pragma once

#include "kernels.h"

namespace xsep::cpu {

const Isa& isa_in_use();

}  // namespace xsep::cpu
