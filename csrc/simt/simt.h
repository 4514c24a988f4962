// What the host compiler sees instead of the CUDA runtime: core/cuda/device.cuh includes either.
//
// The same names with the same meaning, executed by the scheduler; PTX wrappers are modelled in
// simt/copy.h and simt/mma.h. Not modelled: bank conflicts, occupancy, the order in which other
// threads see writes, blocks that wait for each other, and anything of sm_90a.
#pragma once

#include "simt/types.h"
//
#include "simt/atomic.h"
#include "simt/math.h"
#include "simt/scheduler.h"
#include "simt/warp.h"
