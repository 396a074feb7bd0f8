// Statistics of parts of some numbers become those of all.
#pragma once

namespace xsep::cpu {

// Mean, and sum of the squared deviations from it, merged by Chan's formula.
struct Statistics {
  double mean = 0, m2 = 0, count = 0;

  void add(double part_mean, double part_m2, double n) {
    if (n == 0) return;
    const double delta = part_mean - mean;
    mean += delta * (n / (count + n));
    m2 += part_m2 + delta * delta * (count / (count + n) * n);
    count += n;
  }
};

}  // namespace xsep::cpu
