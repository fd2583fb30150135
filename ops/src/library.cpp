// The operators modat::ms_deform_attn, modat::ms_deform_attn_fused and modat::dropout: schema, autograd, no vmap.
// The kernels register themselves for their device; shapes for tracing are in ops/library.py, and the gradient of dropout
// is in model/layers/dropout.py.
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/stack.h>

namespace {

using at::Tensor;
using c10::SymInt;
using Shapes = c10::SymIntArrayRef;
using Three = std::tuple<Tensor, Tensor, Tensor>;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

Tensor plain(const Tensor& value, Shapes shapes, const Tensor& locations, const Tensor& weights) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("modat::ms_deform_attn", "")
                             .typed<Tensor(const Tensor&, Shapes, const Tensor&, const Tensor&)>();
  return op.call(value, shapes, locations, weights);
}

Three plain_backward(const Tensor& grad, const Tensor& value, Shapes shapes, const Tensor& locations,
                     const Tensor& weights) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("modat::ms_deform_attn_backward", "")
                             .typed<Three(const Tensor&, const Tensor&, Shapes, const Tensor&, const Tensor&)>();
  return op.call(grad, value, shapes, locations, weights);
}

Tensor fused(const Tensor& value, Shapes shapes, const Tensor& reference, const Tensor& offsets, const Tensor& logits) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("modat::ms_deform_attn_fused", "")
                             .typed<Tensor(const Tensor&, Shapes, const Tensor&, const Tensor&, const Tensor&)>();
  return op.call(value, shapes, reference, offsets, logits);
}

Three fused_backward(const Tensor& grad, const Tensor& value, Shapes shapes, const Tensor& reference,
                     const Tensor& offsets, const Tensor& logits) {
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("modat::ms_deform_attn_fused_backward", "")
          .typed<Three(const Tensor&, const Tensor&, Shapes, const Tensor&, const Tensor&, const Tensor&)>();
  return op.call(grad, value, shapes, reference, offsets, logits);
}

// Only inputs are saved for the backward pass.
struct Plain : torch::autograd::Function<Plain> {
  static Tensor forward(AutogradContext* context, const Tensor& value, std::vector<SymInt> shapes,
                        const Tensor& locations, const Tensor& weights) {
    at::AutoDispatchBelowADInplaceOrView below;
    context->save_for_backward({value, locations, weights});
    Tensor out = plain(value, shapes, locations, weights);
    context->saved_data["shapes"] = std::move(shapes);
    return out;
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    const auto saved = context->get_saved_variables();
    const auto shapes = context->saved_data["shapes"].toSymIntVector();
    auto [value, locations, weights] = plain_backward(grads[0], saved[0], shapes, saved[1], saved[2]);
    return {value, Tensor(), locations, weights};
  }
};

struct Fused : torch::autograd::Function<Fused> {
  static Tensor forward(AutogradContext* context, const Tensor& value, std::vector<SymInt> shapes,
                        const Tensor& reference, const Tensor& offsets, const Tensor& logits) {
    at::AutoDispatchBelowADInplaceOrView below;
    context->save_for_backward({value, reference, offsets, logits});
    Tensor out = fused(value, shapes, reference, offsets, logits);
    context->saved_data["shapes"] = std::move(shapes);
    return out;
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    const auto saved = context->get_saved_variables();
    const auto shapes = context->saved_data["shapes"].toSymIntVector();
    auto [value, offsets, logits] = fused_backward(grads[0], saved[0], shapes, saved[1], saved[2], saved[3]);
    Tensor reference;
    if (context->needs_input_grad(1)) {  // counts tensors only
      // A location in pixels is reference * size + offset: the offsets' gradients, scaled and summed.
      std::vector<Tensor> levels;
      for (size_t level = 0; 2 * level < shapes.size(); ++level) {
        const Tensor sum = offsets.select(3, static_cast<int64_t>(level)).sum(at::IntArrayRef({2, 3}));  // (N, Q, 2)
        const at::Scalar height(shapes[2 * level]), width(shapes[2 * level + 1]);
        levels.push_back(at::stack({sum.select(2, 0).mul(width), sum.select(2, 1).mul(height)}, -1));
      }
      reference = at::stack(levels, 2);
    }
    return {value, Tensor(), reference, offsets, logits};
  }
};

constexpr auto no_second = "modat::ms_deform_attn has no second derivative; use backend='torch', which has one";

struct PlainBackward : torch::autograd::Function<PlainBackward> {
  static variable_list forward(AutogradContext*, const Tensor& grad, const Tensor& value, const std::vector<SymInt>& shapes,
                               const Tensor& locations, const Tensor& weights) {
    at::AutoDispatchBelowADInplaceOrView below;
    auto [a, b, c] = plain_backward(grad, value, shapes, locations, weights);
    return {a, b, c};
  }
  static variable_list backward(AutogradContext*, const variable_list&) { TORCH_CHECK_NOT_IMPLEMENTED(false, no_second); }
};

struct FusedBackward : torch::autograd::Function<FusedBackward> {
  static variable_list forward(AutogradContext*, const Tensor& grad, const Tensor& value, const std::vector<SymInt>& shapes,
                               const Tensor& reference, const Tensor& offsets, const Tensor& logits) {
    at::AutoDispatchBelowADInplaceOrView below;
    auto [a, b, c] = fused_backward(grad, value, shapes, reference, offsets, logits);
    return {a, b, c};
  }
  static variable_list backward(AutogradContext*, const variable_list&) { TORCH_CHECK_NOT_IMPLEMENTED(false, no_second); }
};

Tensor plain_autograd(const Tensor& value, Shapes shapes, const Tensor& locations, const Tensor& weights) {
  return Plain::apply(value, shapes.vec(), locations, weights);
}

Tensor fused_autograd(const Tensor& value, Shapes shapes, const Tensor& reference, const Tensor& offsets,
                      const Tensor& logits) {
  return Fused::apply(value, shapes.vec(), reference, offsets, logits);
}

Three plain_backward_autograd(const Tensor& grad, const Tensor& value, Shapes shapes, const Tensor& locations,
                              const Tensor& weights) {
  auto all = PlainBackward::apply(grad, value, shapes.vec(), locations, weights);
  return {all[0], all[1], all[2]};
}

Three fused_backward_autograd(const Tensor& grad, const Tensor& value, Shapes shapes, const Tensor& reference,
                              const Tensor& offsets, const Tensor& logits) {
  auto all = FusedBackward::apply(grad, value, shapes.vec(), reference, offsets, logits);
  return {all[0], all[1], all[2]};
}

void refuse_vmap(const c10::OperatorHandle& op, torch::jit::Stack*) {
  TORCH_CHECK_NOT_IMPLEMENTED(false, op.schema().name(), " cannot run under torch.vmap: it takes a batch axis of its own, "
                              "fold the mapped axis into N; or use backend='torch'");
}

}  // namespace

TORCH_LIBRARY(modat, m) {
  m.def("ms_deform_attn(Tensor value, SymInt[] spatial_shapes, Tensor sampling_locations, Tensor attention_weights) -> Tensor");
  m.def(
      "ms_deform_attn_backward(Tensor grad, Tensor value, SymInt[] spatial_shapes, Tensor sampling_locations, "
      "Tensor attention_weights) -> (Tensor, Tensor, Tensor)");
  m.def(
      "ms_deform_attn_fused(Tensor value, SymInt[] spatial_shapes, Tensor reference_points, Tensor sampling_offsets, "
      "Tensor attention_logits) -> Tensor");
  m.def(
      "ms_deform_attn_fused_backward(Tensor grad, Tensor value, SymInt[] spatial_shapes, Tensor reference_points, "
      "Tensor sampling_offsets, Tensor attention_logits) -> (Tensor, Tensor, Tensor)");
  m.def("dropout(Tensor input, float p, int seed) -> Tensor");
  m.def("cpu_capability() -> str");
}

TORCH_LIBRARY_IMPL(modat, Autograd, m) {
  m.impl("ms_deform_attn", plain_autograd);
  m.impl("ms_deform_attn_fused", fused_autograd);
  m.impl("ms_deform_attn_backward", plain_backward_autograd);
  m.impl("ms_deform_attn_fused_backward", fused_backward_autograd);
}

TORCH_LIBRARY_IMPL(modat, FuncTorchBatched, m) {
  for (const char* name :
       {"ms_deform_attn", "ms_deform_attn_backward", "ms_deform_attn_fused", "ms_deform_attn_fused_backward"}) {
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&refuse_vmap>());
  }
}
