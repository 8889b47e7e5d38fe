// A device of type CUDA for a build of torch without CUDA.
//
// It registers the device guard, the hooks and the generator that autograd and operators ask for, so
// that wrapper tensors whose device is "cuda" work on the processor. No memory and no kernel is behind it.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <vector>

namespace c10::impl {

struct SimulatedGuard final : public NoOpDeviceGuardImpl<DeviceType::CUDA> {
  static Device only() { return Device(DeviceType::CUDA, 0); }
  static Stream stream() { return Stream(Stream::DEFAULT, only()); }
  DeviceIndex deviceCount() const noexcept override { return 1; }
  Device getDevice() const override { return only(); }
  Device exchangeDevice(Device) const override { return only(); }
  Stream getStream(Device) const noexcept override { return stream(); }
  Stream getDefaultStream(Device) const override { return stream(); }
  Stream getNewStream(Device, int) const override { return stream(); }
  Stream exchangeStream(Stream) const noexcept override { return stream(); }
  void record(void**, const Stream&, const DeviceIndex, const EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
};

C10_REGISTER_GUARD_IMPL(CUDA, SimulatedGuard)

}  // namespace c10::impl

namespace at {

// The processor's generator, with states of the size that CUDA's have: 64 bits of a seed and 64 of an
// offset, which is here the number of a saved engine.
struct SimulatedGenerator : public CPUGeneratorImpl {
  SimulatedGenerator() : CPUGeneratorImpl(default_rng_seed_val) { device_ = Device(kCUDA, 0); }
  static constexpr int64_t bytes = 16;
  static std::vector<mt19937>& saved() {
    static std::vector<mt19937> engines;
    return engines;
  }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override {
    auto state = at::detail::empty_cpu({bytes}, at::kByte);
    auto* numbers = static_cast<uint64_t*>(state.mutable_data_ptr());
    numbers[0] = const_cast<SimulatedGenerator*>(this)->current_seed();
    numbers[1] = saved().size();
    saved().push_back(const_cast<SimulatedGenerator*>(this)->engine());
    return state.getIntrusivePtr();
  }
  void set_state(const c10::TensorImpl& given) override {
    TORCH_CHECK(given.numel() == bytes, "RNG state is wrong size");
    const auto* numbers = static_cast<const uint64_t*>(given.data());
    set_current_seed(numbers[0]);
    if (numbers[1] < saved().size()) set_engine(saved()[numbers[1]]);
  }
};

static const Generator& default_generator() {
  static const Generator generator = make_generator<SimulatedGenerator>();
  return generator;
}

// Hooks are found by this name.
struct CUDAHooks : public CUDAHooksInterface {
  explicit CUDAHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasCuDNN() const override { return true; }
  bool compiledWithCuDNN() const override { return true; }
  long versionCuDNN() const override { return 91000; }
  long versionRuntimeCuDNN() const override { return 91000; }
  long versionCuDNNFrontend() const override { return 11200; }
  long versionCUDART() const override { return 13000; }
  double batchnormMinEpsilonCuDNN() const override { return 0.0; }
  bool supportsBFloat16ConvolutionWithCuDNNv8() const override { return true; }
  bool supportsDilatedConvolutionWithCuDNN() const override { return true; }
  bool supportsDepthwiseConvolutionWithCuDNN() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex current_device() const override { return 0; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  DeviceIndex exchangeDevice(DeviceIndex) const override { return 0; }
  DeviceIndex maybeExchangeDevice(DeviceIndex) const override { return 0; }
  int getNumGPUs() const override { return 1; }
  const Generator& getDefaultGenerator(DeviceIndex = -1) const override { return default_generator(); }
  Generator getNewGenerator(DeviceIndex = -1) const override { return make_generator<SimulatedGenerator>(); }
  void deviceSynchronize(DeviceIndex) const override {}
};

REGISTER_CUDA_HOOKS(CUDAHooks)

}  // namespace at

// Copy the engine of one generator, given by its address, to another.
extern "C" void copy_engine(at::CPUGeneratorImpl* from, at::CPUGeneratorImpl* to) {
  to->set_engine(from->engine());
}
