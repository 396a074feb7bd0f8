// The emulator in the Python module: the order of its threads, and what it counts.

#include <pybind11/stl.h>

#include "../cuda/device.h"
#include "bind.h"

namespace py = pybind11;

namespace xsep {

namespace {

py::dict counts(const cuda::emulator::Traffic& traffic) {
  py::dict by_width;
  for (int i = 0; i < 5; ++i) by_width[py::int_(1 << i)] = traffic.accesses[i];
  py::dict found;
  found["accesses"] = by_width;
  found["bytes"] = traffic.bytes();
  found["warp_accesses"] = traffic.warp_accesses;
  found["sectors"] = traffic.sectors;
  found["distinct_sectors"] = traffic.distinct_sectors;
  return found;
}

}  // namespace

void bind_emulator(py::module_& m) {
  m.def("set_order", cuda::emulator::set_order, py::arg("order"),
        "The order in which threads run: 'ascending', 'descending' or the seed of a shuffle.");
  m.def(
      "start_counting",
      [](int64_t cache_bytes, int multiprocessors, int resident_blocks) {
        cuda::emulator::start_counting({cache_bytes, multiprocessors, resident_blocks});
      },
      py::arg("cache_bytes") = cuda::emulator::CacheModel{}.bytes, py::arg("multiprocessors") = 1,
      py::arg("resident_blocks") = 1);
  m.def(
      "stop_counting",
      [] {
        py::list launches;
        for (const cuda::emulator::Launch& launch : cuda::emulator::stop_counting()) {
          py::dict found;
          found["kernel"] = launch.kernel;
          found["grid"] = launch.grid.x;
          found["block"] = launch.block.x;
          found["shared_bytes"] = launch.shared_bytes;
          found["loads"] = counts(launch.loads);
          found["stores"] = counts(launch.stores);
          found["load_sectors_after_cache"] = launch.load_sectors_after_cache;
          launches.append(found);
        }
        return launches;
      },
      "What each launch since start_counting() loaded and stored.");
}

}  // namespace xsep
