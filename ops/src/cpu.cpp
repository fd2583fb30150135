// The CPU kernels as operators: choice of the instruction set, scratch memory, threads.
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <cmath>
#include <cstdlib>
#include <string>
#include <string_view>

#include "library.h"

namespace modat {
namespace {

// MODAT_CPU_CAPABILITY=portable|avx2|avx512 selects a lower instruction set, for tests and comparisons.
Kernels choose(Storage storage) {
#if defined(__x86_64__)
  const char* wanted = std::getenv("MODAT_CPU_CAPABILITY");
  const std::string_view most = wanted ? wanted : "avx512";
  static const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  static const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                             __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
  if (avx512 && most == "avx512") return avx512_kernels(storage);
  if (avx2 && most != "portable") return avx2_kernels(storage);
#endif
  return portable_kernels(storage);
}

// Runs `kernel` over `tasks` in ranges with separate scratch memory; below `grain` tasks per thread, threads do not pay.
void run(void (*kernel)(const Problem&, int64_t, int64_t, void*), const Problem& p, int64_t tasks, int64_t scratch,
         int64_t grain) {
  constexpr int64_t line = 64;
  scratch = (scratch + line - 1) / line * line;
  const int64_t threads = std::min<int64_t>(at::get_num_threads(), (tasks + grain - 1) / grain);
  const Tensor memory = at::empty({threads * scratch + line}, at::TensorOptions().dtype(at::kByte));
  auto* start = reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(memory.mutable_data_ptr()) + line - 1) / line * line);
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) kernel(p, i * tasks / threads, (i + 1) * tasks / threads, start + i * scratch);
  });
}

Tensor forward(Call call) {
  Problem& p = call.problem;
  Tensor out = at::empty({p.batch, p.queries, p.heads * p.channels}, call.value.options());
  if (out.numel() == 0) return out;
  p.out = out.mutable_data_ptr();
  const Kernels kernels = choose(storage_of(call.value));
  const int64_t work = p.levels * p.points * p.channels;
  run(kernels.forward, p, p.batch * p.heads * p.queries, kernels.forward_scratch(p), std::max<int64_t>(1, 65536 / work));
  return out;
}

std::tuple<Tensor, Tensor, Tensor> backward(Call call, const Tensor& grad) {
  Gradients grads(call, grad, true);
  const Problem& p = call.problem;
  if (p.batch * p.queries == 0) {
    grads.value.zero_();
  } else {
    const Kernels kernels = choose(storage_of(call.value));
    run(kernels.backward, p, p.batch * p.heads, kernels.backward_scratch(p), 1);
  }
  return {grads.value, grads.samples, grads.weights};
}

Tensor dropout(const Tensor& input, double p, int64_t seed) {
  TORCH_CHECK_VALUE(p >= 0 && p < 1, "modat: a dropout probability is in [0, 1), got ", p);
  TORCH_CHECK_TYPE(input.scalar_type() != at::kDouble, "modat: dropout takes float32, bfloat16 or float16");
  const Kernels kernels = choose(storage_of(input));
  const Tensor in = input.contiguous();
  Tensor out = at::empty_like(in);
  constexpr int64_t block = 32, grain = 1024;
  const auto threshold = static_cast<uint32_t>(std::lround(p * 65536));
  const Masking d{in.const_data_ptr(), out.mutable_data_ptr(), in.numel(), static_cast<uint64_t>(seed), threshold,
                  static_cast<float>(1 / (1 - p))};
  at::parallel_for(0, (d.count + block - 1) / block, grain,
                   [&](int64_t begin, int64_t end) { kernels.dropout(d, begin, end); });
  return out;
}

std::string capability() { return choose(Storage::f32).name; }

}  // namespace
}  // namespace modat

TORCH_LIBRARY_IMPL(modat, CPU, m) {
  modat::Operators<modat::forward, modat::backward>::enter(m);
  m.impl("dropout", modat::dropout);
}

TORCH_LIBRARY_IMPL(modat, CatchAll, m) { m.impl("cpu_capability", modat::capability); }
