// The device "strict": its memory is the processor's and its operations are the processor's on copies, but like a GPU it
// refuses the processor's tensors and generators, and numpy. What copies cannot do (memory, views, convolutions) is below.
#define TORCH_ASSERT_ONLY_METHOD_OPERATORS
#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_cpu_dispatch.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/set_cpu_dispatch.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/alloc_cpu.h>
#include <torch/library.h>

using at::IntArrayRef;
using at::Tensor;
constexpr auto STRICT = c10::DeviceType::PrivateUse1;
constexpr c10::DispatchKeySet KEYS(c10::DispatchKey::PrivateUse1);
const c10::Device device(STRICT, 0);

struct Memory final : c10::Allocator {
  at::DataPtr allocate(size_t bytes) override {
    void* data = c10::alloc_cpu(bytes);
    return {data, data, &c10::free_cpu, device};
  }
  at::DeleterFnPtr raw_deleter() const override { return &c10::free_cpu; }
  void copy_data(void* to, const void* from, std::size_t bytes) const override { default_copy_data(to, from, bytes); }
} memory;
REGISTER_ALLOCATOR(STRICT, &memory);

// One device, one stream, and nothing to wait for. (torch's own idle guard has devices without a number; autograd fails.)
struct Guard final : c10::impl::DeviceGuardImplInterface {
  const c10::Stream stream{c10::Stream::DEFAULT, device};
  c10::DeviceType type() const override { return STRICT; }
  c10::Device exchangeDevice(c10::Device) const override { return device; }
  c10::Device getDevice() const override { return device; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const override { return stream; }
  c10::Stream getDefaultStream(c10::Device) const override { return stream; }
  c10::Stream exchangeStream(c10::Stream) const override { return stream; }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  bool queryStream(const c10::Stream&) const override { return true; }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Hooks final : at::PrivateUse1HooksInterface {
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  bool isAvailable() const override { return true; }
  bool isBuilt() const override { return true; }
  c10::Allocator* getPinnedMemoryAllocator() const override { return c10::GetCPUAllocator(); }
} hooks;
const bool registered = (at::RegisterPrivateUse1HooksInterface(&hooks), true);

// As on a GPU, a single number of the processor may be read among tensors of the device, and nothing else.
void check(const Tensor& tensor, const std::string& operation, bool written = false) {
  TORCH_CHECK(!tensor.defined() || tensor.device() == device || (tensor.dim() == 0 && !written), "Expected all tensors ",
              "to be on the same device, but ", operation, " found at least two devices, strict:0 and ", tensor.device());
}

// The same memory, seen as the processor's.
Tensor seen(const Tensor& tensor) {
  if (!tensor.defined() || tensor.is_cpu()) return tensor;
  return at::from_blob(tensor.data_ptr(), tensor.sizes(), tensor.strides(), tensor.options().device(at::kCPU));
}

Tensor moved(const Tensor& tensor) { return tensor.defined() ? tensor.to(device) : tensor; }

using Type = std::optional<at::ScalarType>;
Tensor empty(IntArrayRef size, Type type, std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool>,
             std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(size, &memory, KEYS, c10::dtype_or_default(type), format);
}

Tensor empty_strided(IntArrayRef size, IntArrayRef stride, Type type, std::optional<at::Layout>, std::optional<at::Device>,
                     std::optional<bool>) {
  return at::detail::empty_strided_generic(size, stride, &memory, KEYS, c10::dtype_or_default(type));
}

const Tensor& resize(const Tensor& self, IntArrayRef size, std::optional<at::MemoryFormat> format) {
  Tensor made = at::empty(size, self.options().memory_format(format.value_or(at::MemoryFormat::Contiguous)));
  self.unsafeGetTensorImpl()->set_storage_keep_dtype(made.storage());
  self.unsafeGetTensorImpl()->set_sizes_and_strides(made.sizes(), made.strides());
  return self;
}

Tensor copy_from(const Tensor& from, const Tensor& to, bool) {
  seen(to).copy_(seen(from));
  return to;
}

Tensor copy_from_and_resize(const Tensor& from, const Tensor& to) {
  return copy_from(from, to.sizes() == from.sizes() ? to : resize(to, from.sizes(), std::nullopt), false);
}

at::Scalar item(const Tensor& self) { return seen(self).item(); }

Tensor convolution(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, IntArrayRef stride,
                   IntArrayRef padding, IntArrayRef dilation, bool transposed, IntArrayRef output_padding, int64_t groups) {
  for (const Tensor& tensor : {x, weight, bias.value_or(Tensor())}) check(tensor, "convolution");
  return moved(at::convolution(seen(x), seen(weight), seen(bias.value_or(Tensor())), stride, padding, dilation, transposed,
                               output_padding, groups));
}

std::tuple<Tensor, Tensor, Tensor> convolution_backward(
    const Tensor& gradient, const Tensor& x, const Tensor& weight, IntArrayRef stride, IntArrayRef padding,
    IntArrayRef dilation, bool transposed, IntArrayRef output_padding, int64_t groups, std::array<bool, 3> mask) {
  for (const Tensor& tensor : {gradient, x, weight}) check(tensor, "convolution_backward");
  auto [dx, dweight, dbias] =
      at::convolution_backward(seen(gradient), seen(x), seen(weight), IntArrayRef(gradient.size(1)), stride, padding,
                               dilation, transposed, output_padding, groups, mask);
  return {moved(dx), moved(dweight), moved(dbias)};
}

void on_copies(const c10::OperatorHandle& operation, torch::jit::Stack* stack) {
  const auto& arguments = operation.schema().arguments();
  for (size_t i = 0; i < arguments.size(); i++) {
    const auto& value = torch::jit::peek(*stack, i, arguments.size());
    const bool written = arguments[i].alias_info() && arguments[i].alias_info()->isWrite();
    if (value.isTensor()) check(value.toTensor(), operation.schema().name(), written);
    if (value.isTensorList())
      for (const Tensor& tensor : value.toTensorVector()) check(tensor, operation.schema().name(), written);
    TORCH_CHECK(!value.isGenerator() || value.toGenerator().device() == device,
                "Expected a 'strict' device type for generator but found 'cpu'");
  }
  at::native::cpu_fallback(operation, stack, true);
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&on_copies>()); }

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("resize_", &resize);
  m.impl("_copy_from", &copy_from);
  m.impl("_copy_from_and_resize", &copy_from_and_resize);
  m.impl("_local_scalar_dense", &item);
  m.impl("convolution_overrideable", &convolution);
  m.impl("convolution_backward_overrideable", &convolution_backward);
  m.impl("view", &at::native::view);
  m.impl("_reshape_alias", &at::native::_reshape_alias);
  m.impl("unfold", &at::native::unfold);
  m.impl("as_strided", static_cast<Tensor (*)(const Tensor&, IntArrayRef, IntArrayRef, std::optional<int64_t>)>(
                           &at::cpu::as_strided));
  m.impl("set_.source_Storage", static_cast<Tensor& (*)(Tensor&, at::Storage)>(&at::native::set_));
  m.impl("set_.source_Storage_storage_offset",
         static_cast<Tensor& (*)(Tensor&, at::Storage, int64_t, IntArrayRef, IntArrayRef)>(&at::cpu::set_));
}
