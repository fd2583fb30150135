// See emulator.h. Fibers switch with a few lines of x86-64 assembly: swapcontext would enter the kernel each time.
#include "emulator.h"

#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#else
static void __sanitizer_start_switch_fiber(void**, const void*, size_t) {}
static void __sanitizer_finish_switch_fiber(void*, const void**, size_t*) {}
#endif

uint3 threadIdx{}, blockIdx{};
dim3 blockDim, gridDim;
emu::Counts emu::counts{};

// Saves the registers that a callee must keep and the stack pointer, and goes on where `to` was saved.
extern "C" void emulator_switch(void** from, void* to);
asm(R"(
.text
.hidden emulator_switch
.globl emulator_switch
.type emulator_switch, @function
emulator_switch:
  push %rbp; push %rbx; push %r12; push %r13; push %r14; push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15; pop %r14; pop %r13; pop %r12; pop %rbx; pop %rbp
  ret
)");

namespace emu {
namespace {

constexpr unsigned warp_size = 32;
constexpr size_t stack_bytes = 256 << 10;
constexpr const char* names[] = {"no call",    "__shfl_sync",   "__shfl_xor_sync", "__ballot_sync",
                                 "__syncwarp", "__syncthreads", "the end"};

struct Fiber {
  std::unique_ptr<char[]> stack{new char[stack_bytes]};  // pages are touched on use only
  void* pointer = nullptr;                               // its stack pointer while another fiber runs
  void* fake_stack = nullptr;                            // AddressSanitizer's
  uint3 index{};
  Call call = Call::none;
  // Arguments and result of the warp function that it waits in.
  unsigned mask = 0;
  int operand = 0, width = 0;
  size_t size = 0;
  unsigned char in[16], out[16];
};

std::vector<std::unique_ptr<Fiber>> fibers;  // kept between launches
unsigned threads = 0, current = 0;           // of this block; the fiber that runs
const std::function<void()>* kernel = nullptr;
void* scheduler = nullptr;  // its stack pointer while a fiber runs
const void* scheduler_stack = nullptr;
size_t scheduler_bytes = 0;
std::unique_ptr<unsigned char[]> shared;
const char* problem = nullptr;
int order_seed = 0;

[[noreturn]] void fail(const std::string& what, unsigned thread) {
  throw std::runtime_error("CUDA emulation: " + what + " (block " + std::to_string(blockIdx.x) + ", " +
                           std::to_string(blockIdx.y) + ", " + std::to_string(blockIdx.z) + ", thread " +
                           std::to_string(thread) + ")");
}

void leave(Fiber& fiber) {
  __sanitizer_start_switch_fiber(fiber.call == Call::ended ? nullptr : &fiber.fake_stack, scheduler_stack, scheduler_bytes);
  emulator_switch(&fiber.pointer, scheduler);
  __sanitizer_finish_switch_fiber(fiber.fake_stack, &scheduler_stack, &scheduler_bytes);
}

void enter() {
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_bytes);
  (*kernel)();
  fibers[current]->call = Call::ended;
  leave(*fibers[current]);
}

void start(Fiber& fiber, unsigned thread, dim3 block) {
  fiber.index = {thread % block.x, thread / block.x % block.y, thread / block.x / block.y};
  fiber.call = Call::none;
  fiber.fake_stack = nullptr;
  void** top = reinterpret_cast<void**>((uintptr_t(fiber.stack.get()) + stack_bytes) & ~uintptr_t(15));
  *--top = nullptr;  // where enter() would return to
  *--top = reinterpret_cast<void*>(&enter);
  fiber.pointer = top - 6;  // the registers, whatever they hold
}

void resume(unsigned thread) {
  Fiber& fiber = *fibers[thread];
  current = thread;
  threadIdx = fiber.index;
  void* fake_stack = nullptr;
  __sanitizer_start_switch_fiber(&fake_stack, fiber.stack.get(), stack_bytes);
  emulator_switch(&scheduler, fiber.pointer);
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
  if (problem) fail(std::exchange(problem, nullptr), thread);
  if (fiber.call != Call::none && fiber.call < Call::barrier && !(fiber.mask >> thread % warp_size & 1)) {
    fail(std::string(names[int(fiber.call)]) + ": the mask lacks the lane that calls", thread);
  }
}

// The result of a warp function for each lane of its mask.
void carry_out(unsigned first, unsigned mask) {
  unsigned votes = 0;
  for (unsigned lane = 0; lane < warp_size; ++lane) {
    if (mask >> lane & 1 && fibers[first + lane]->operand) votes |= 1u << lane;
  }
  for (unsigned lane = 0; lane < warp_size; ++lane) {
    if (!(mask >> lane & 1)) continue;
    Fiber& fiber = *fibers[first + lane];
    const unsigned width = unsigned(fiber.width), begin = lane / width * width, operand = unsigned(fiber.operand);
    unsigned source = lane;
    if (fiber.call == Call::shuffle) source = begin + operand % width;
    if (fiber.call == Call::shuffle_xor) source = lane ^ operand;
    if (source >= begin + width) source = lane;  // as CUDA defines
    if (!(mask >> source & 1)) fail("a shuffle reads lane " + std::to_string(source) + ", outside of its mask", first + lane);
    memcpy(fiber.out, fibers[first + source]->in, fiber.size);
    if (fiber.call == Call::ballot) memcpy(fiber.out, &votes, sizeof votes);
  }
  for (unsigned lane = 0; lane < warp_size; ++lane) {
    if (mask >> lane & 1) fibers[first + lane]->call = Call::none;
  }
}

// Carries out the warp functions whose lanes have all arrived; whether there were any.
bool settle(unsigned first) {
  bool moved = false;
  for (unsigned lane = 0; lane < warp_size && first + lane < threads; ++lane) {
    const Fiber& fiber = *fibers[first + lane];
    if (fiber.call == Call::none || fiber.call >= Call::barrier) continue;
    bool complete = true;
    for (unsigned other = 0; other < warp_size; ++other) {
      if (!(fiber.mask >> other & 1)) continue;
      const Call call = first + other < threads ? fibers[first + other]->call : Call::ended;
      if (call == Call::ended) fail("a mask names lane " + std::to_string(other) + ", which has ended", first + lane);
      if (call == Call::none || call == Call::barrier) {
        complete = false;
        continue;
      }
      const Fiber& peer = *fibers[first + other];
      if (call != fiber.call || peer.mask != fiber.mask || peer.size != fiber.size || peer.width != fiber.width) {
        fail("lanes " + std::to_string(lane) + " and " + std::to_string(other) + " meet in " + names[int(fiber.call)] +
                 " and " + names[int(call)] + ", or with different masks, types or widths",
             first + lane);
      }
    }
    if (complete) carry_out(first, fiber.mask), moved = true;
  }
  return moved;
}

void run_block(dim3 block, std::mt19937* order) {
  for (unsigned thread = 0; thread < threads; ++thread) start(*fibers[thread], thread, block);
  std::vector<unsigned> turns(threads);
  for (unsigned i = 0; i < threads; ++i) turns[i] = i;
  while (true) {
    if (order) std::shuffle(turns.begin(), turns.end(), *order);
    bool moved = false;
    for (unsigned thread : turns) {
      if (fibers[thread]->call == Call::none) resume(thread), moved = true;
    }
    for (unsigned first = 0; first < threads; first += warp_size) moved |= settle(first);
    size_t waiting = 0, ended = 0;
    for (unsigned thread = 0; thread < threads; ++thread) {
      waiting += fibers[thread]->call == Call::barrier, ended += fibers[thread]->call == Call::ended;
    }
    if (ended == threads) return;
    if (waiting + ended == threads) {
      if (ended) fail("__syncthreads() after some threads have ended", 0);
      for (unsigned thread = 0; thread < threads; ++thread) fibers[thread]->call = Call::none;
    } else if (!moved) {
      fail("threads wait for others that never arrive", 0);
    }
  }
}

}  // namespace

void collective(Call call, unsigned mask, const void* value, void* result, size_t size, int operand, int width) {
  Fiber& fiber = *fibers[current];
  fiber.call = call, fiber.mask = mask, fiber.operand = operand, fiber.width = width, fiber.size = size;
  if (size) memcpy(fiber.in, value, size);
  leave(fiber);
  if (size) memcpy(result, fiber.out, size);
}

void stop(const char* what) {
  problem = what;
  leave(*fibers[current]);
  __builtin_unreachable();
}

unsigned char* shared_memory() { return shared.get(); }

void launch(dim3 grid, dim3 block, size_t shared_bytes, const void*, const std::function<void()>& body) {
  threads = block.x * block.y * block.z;
  if (threads == 0 || threads > 1024) throw std::runtime_error("CUDA emulation: a block of no or over 1024 threads");
  if (!grid.x || !grid.y || !grid.z || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) {
    throw std::runtime_error("CUDA emulation: the grid is empty or too large");
  }
  if (shared_bytes > 48 << 10) throw std::runtime_error("CUDA emulation: over 48 KB of shared memory");
  ++counts.launches;
  gridDim = grid, blockDim = block, kernel = &body;
  shared.reset(new unsigned char[shared_bytes]);
  while (fibers.size() < threads) fibers.push_back(std::make_unique<Fiber>());
  std::mt19937 random{unsigned(order_seed)};
  std::vector<int64_t> blocks(int64_t(grid.x) * grid.y * grid.z);
  for (size_t i = 0; i < blocks.size(); ++i) blocks[i] = int64_t(i);
  if (order_seed) std::shuffle(blocks.begin(), blocks.end(), random);
  for (int64_t i : blocks) {
    blockIdx = {unsigned(i % grid.x), unsigned(i / grid.x % grid.y), unsigned(i / grid.x / grid.y)};
    memset(shared.get(), 0xff, shared_bytes);
    run_block(block, order_seed ? &random : nullptr);
  }
}

}  // namespace emu

// 0: threads and blocks in order; else in an order drawn from this seed, anew at each step.
extern "C" void emulator_order(int seed) { emu::order_seed = seed; }
extern "C" void emulator_counts(int64_t* into) { into[0] = emu::counts.launches, into[1] = emu::counts.atomics; }
