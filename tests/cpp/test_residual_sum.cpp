// The CPU's residual sums, forward and backward, every element type and instruction set, against naive loops in double.

#include "../../csrc/residual_sum.h"

#include <cstdlib>

#include "separable_cases.h"

using namespace xsep;
using namespace xsep::cases;

namespace {

enum class Skip { kNone, kRelu, kPlain, kVectors };  // without skip, perhaps with a ReLU; with it

// Exactly the bytes asked for, so that the sanitizer guards the workspace too; they start as NaN.
void run(ResidualSumArgs args) {
  const int64_t bytes = cpu::workspace_bytes(args);
  void* workspace = std::aligned_alloc(64, (bytes + 63) / 64 * 64);
  std::memset(workspace, 0xff, bytes);
  args.workspace = workspace;
  cpu::residual_sum(args);
  std::free(workspace);
}

// Where in y each output's number comes from: the first of the largest.
std::vector<int64_t> chosen(const ConvShape& s, const std::vector<double>& y) {
  std::vector<int64_t> result(s.y_numel(), -1);
  reference::for_each_product(s, [&](int64_t i, int64_t j, int64_t) {
    if (result[i] < 0 || y[j] > y[result[i]]) result[i] = j;
  });
  return result;
}

void test(const ConvShape& s, Dtype dtype, Skip kind, int threads, const std::string& what) {
  const Dtype vector_type = dtype == Dtype::kFloat64 ? dtype : Dtype::kFloat32;
  const int64_t plane = int64_t{s.P()} * s.Q(), count = s.y_numel();
  Random random;
  Truth y = random.draw(dtype, s.x_numel());
  for (double& v : y.values) v = std::round(2 * v) / 2;  // many are the same
  const Truth skip = random.draw(dtype, count), dout = random.draw(dtype, count);
  const Truth center = random.draw(vector_type, s.C), scale = random.draw(vector_type, s.C),
              shift = random.draw(vector_type, s.C), skip_center = random.draw(vector_type, s.C),
              skip_scale = random.draw(vector_type, s.C), skip_shift = random.draw(vector_type, s.C);
  const std::vector<int64_t> from = chosen(s, y.values);

  const auto zeros = [](int64_t n) { return Truth{std::vector<double>(n), std::vector<double>(n)}; };
  const auto add = [](Truth& t, int64_t i, double value) { t.values[i] += value, t.magnitude[i] += std::abs(value); };
  Truth out = zeros(count), dy = zeros(s.x_numel()), dskip = zeros(count), dscale = zeros(s.C), dshift = zeros(s.C),
        dskip_scale = zeros(s.C);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t c = i / plane % s.C;
    const double largest = y.values[from[i]];
    double given = dout.values[i];
    add(out, i, scale.values[c] * largest), add(out, i, -scale.values[c] * center.values[c]);
    add(out, i, shift.values[c]);
    if (kind == Skip::kRelu && out.values[i] <= 0) given = out.values[i] = 0;
    add(dy, from[i], scale.values[c] * given);
    add(dshift, c, given), add(dscale, c, given * (largest - center.values[c]));
    if (kind == Skip::kPlain) add(out, i, skip.values[i]);
    if (kind != Skip::kVectors) continue;
    add(out, i, skip_scale.values[c] * skip.values[i]), add(out, i, -skip_scale.values[c] * skip_center.values[c]);
    add(out, i, skip_shift.values[c]);
    add(dskip, i, skip_scale.values[c] * given);
    add(dskip_scale, c, given * (skip.values[i] - skip_center.values[c]));
  }

  Tensor y_tensor(dtype, true, s.N, s.C, s.H, s.W, true), skip_tensor(dtype, true, s.N, s.C, s.P(), s.Q(), true),
      dout_tensor = skip_tensor, made(dtype, true, s.N, s.C, s.P(), s.Q());
  y_tensor.fill(y.values), skip_tensor.fill(skip.values), dout_tensor.fill(dout.values);
  const Tensor centers = vector_of(vector_type, center.values), scales = vector_of(vector_type, scale.values),
               shifts = vector_of(vector_type, shift.values), skip_centers = vector_of(vector_type, skip_center.values),
               skip_scales = vector_of(vector_type, skip_scale.values),
               skip_shifts = vector_of(vector_type, skip_shift.values);
  ResidualSumArgs args{};
  args.shape = s, args.dtype = dtype, args.threads = threads, args.y = y_tensor.ref();
  args.center = centers.bytes.data(), args.scale = scales.bytes.data(), args.shift = shifts.bytes.data();
  args.relu = kind == Skip::kRelu;
  if (kind == Skip::kPlain || kind == Skip::kVectors) args.skip = skip_tensor.ref();
  if (kind == Skip::kVectors) {
    args.skip_center = skip_centers.bytes.data(), args.skip_scale = skip_scales.bytes.data();
    args.skip_shift = skip_shifts.bytes.data();
  }
  args.out = made.bytes.data();
  run(args);
  compare(what + " out", dtype, made.values(), out);

  args.backward = true, args.dout = dout_tensor.ref();
  if (kind == Skip::kPlain) args.skip = {};
  Tensor made_dy(dtype, true, s.N, s.C, s.H, s.W), made_dskip = made;
  Tensor sums[] = {vector_of(vector_type, dscale.values), vector_of(vector_type, dshift.values),
                   vector_of(vector_type, dskip_scale.values)};
  for (Tensor& sum : sums) sum.fill(std::vector<double>(s.C, NAN));
  args.dy = made_dy.bytes.data(), args.dskip = made_dskip.bytes.data();
  args.dscale = sums[0].bytes.data(), args.dshift = sums[1].bytes.data(), args.dskip_scale = sums[2].bytes.data();
  run(args);
  compare(what + " dy", dtype, made_dy.values(), dy);
  compare(what + " dscale", vector_type, sums[0].values(), dscale);
  compare(what + " dshift", vector_type, sums[1].values(), dshift);
  if (kind != Skip::kVectors) return;
  compare(what + " dskip", dtype, made_dskip.values(), dskip);
  compare(what + " dskip_scale", vector_type, sums[2].values(), dskip_scale);
}

bool is_pool(const ConvShape& s) {
  return s.M == 1 && s.dilation_h == 1 && s.dilation_w == 1 && std::max(s.pad_top, s.pad_bottom) < s.R &&
         std::max(s.pad_left, s.pad_right) < s.S;
}

}  // namespace

int main() {
  int turn = 0;
  for (const Named& named : kShapes) {
    if (!is_pool(named.shape)) continue;
    ++turn;  // another kind for each element type and instruction set
    for (Dtype dtype : kDtypes)
      for (int isa = 0; isa < cpu::isa_count(); ++isa, ++turn) {
        const Skip kind = static_cast<Skip>(turn % 4);
        cpu::set_isa(isa);
        // The more threads, the more images and rows of windows are cut.
        for (int threads : {1, 2, 5}) {
          test(named.shape, dtype, kind, threads,
               std::string(cpu::isa_name(isa)) + " " + named.name + " " + name(dtype) + " skip " +
                   std::to_string(static_cast<int>(kind)) + " threads " + std::to_string(threads));
        }
      }
  }
  std::printf("%d checks, %d failed, on %d instruction sets\n", checks, failures, cpu::isa_count());
  return failures != 0;
}
