// A simulated GPU: device type "cuda" for a CPU build of torch. The parts, lowest first:
//
//   clocks.h      streams, and which work comes after which
//   hazards.h     who has read and written a piece of memory; findings
//   allocator.h   the model of the caching allocator
//   memory.h      host memory behind its blocks; pinned memory
//   counters.h    kernels, waits, copies
//   launches.h    the books of one kernel
//   guard.h       devices, streams and events, as torch asks for them
//   aliases.h     one memory as a device tensor and as a CPU tensor
//   fallback.h    any operator, by the CPU's kernel
//   kernels.h     operators that need more
//   operators.h   what Python asks
//
// They are compiled together: torch's headers take most of the time, and would take it for each part.
#include "operators.h"

namespace simulated_gpu {
namespace {

TORCH_LIBRARY_IMPL(_, CUDA, library) { library.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }

TORCH_LIBRARY_IMPL(aten, CUDA, library) {
  library.impl("empty.memory_format", empty);
  library.impl("empty_strided", empty_strided);
  library.impl("copy_", copy_);
  library.impl("_local_scalar_dense", item);
  library.impl("record_stream", record_stream);
  library.impl("_scaled_dot_product_fused_attention_overrideable", attention);
  // Views and sizes: the CPU's functions, which only handle sizes, strides and storages.
  library.impl("as_strided", at::native::as_strided_tensorimpl);
  library.impl("view", at::native::view);
  library.impl("_reshape_alias", at::native::_reshape_alias);
  library.impl("resize_", at::native::resize_);
  library.impl("set_", set_to_nothing);
  library.impl("set_.source_Storage", set_to_storage);
  library.impl("set_.source_Storage_storage_offset", at::native::set_storage_cpu_);
  library.impl("set_.source_Tensor", at::native::set_tensor_);
}

TORCH_LIBRARY(simulated_gpu, library) {
  library.def("totals() -> Dict(str, int)", &totals);
  library.def("launches_by_operation() -> Dict(str, int)", &launches_by_operation);
  library.def("synchronizations_by_reason() -> Dict(str, int)", &synchronizations_by_reason);
  library.def("reset_counters() -> ()", &reset_counters);
  library.def("findings() -> str[]", &all_findings);
  library.def("clear_findings() -> ()", &clear_findings);
  library.def("memory_stats(int device) -> Dict(str, int)", &memory_stats);
  library.def("set_memory_fraction(float fraction, int device) -> ()", &set_memory_fraction);
  library.def("memory_fraction(int device) -> float", &memory_fraction);
  library.def("set_total_bytes(int bytes, int device) -> ()", &set_total_bytes);
  library.def("cpu_alias(Tensor tensor) -> Tensor");
  library.def("count_launch(str operation, Tensor[] reads, Tensor[] writes, int device) -> ()");
}
TORCH_LIBRARY_IMPL(simulated_gpu, CompositeExplicitAutograd, library) {
  library.impl("cpu_alias", &cpu_alias);
  library.impl("count_launch", &count_launch);
}

struct Registration {
  Registration() {
    c10::SetAllocator(c10::DeviceType::CUDA, &allocator(), /*priority=*/255);
    static c10::impl::DeviceGuardImplRegistrar registrar(c10::DeviceType::CUDA, &guard());
    at::CUDAHooksRegistry()->Register("CUDAHooks",
                                      [](at::CUDAHooksArgs arguments) -> std::unique_ptr<at::CUDAHooksInterface> {
                                        return std::make_unique<Hooks>(arguments);
                                      });
    at::native::_fused_sdp_choice_stub.set_cuda_dispatch_ptr(&choose_attention);
  }
} registration;

}  // namespace
}  // namespace simulated_gpu
