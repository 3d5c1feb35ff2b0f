// Runs kernel bodies on the host; arrays come from and go to files. The lanes of a threadgroup take
// turns in one thread, each with a stack of its own, and change at barriers. With PA_THREADS, for
// the sanitizers, they are threads.
#include <pthread.h>
#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

typedef _Float16 float16_t;

struct bfloat16_t {
  uint16_t bits;
  bfloat16_t() = default;
  explicit bfloat16_t(float value) {
    uint32_t wide;
    std::memcpy(&wide, &value, 4);
    bits = (wide + 0x7fff + (wide >> 16 & 1)) >> 16;
  }
  explicit operator float() const {
    const uint32_t wide = uint32_t(bits) << 16;
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
  }
};

struct Emu;
thread_local Emu* pa_emu;

#ifdef PA_THREADS
struct Barrier {
  pthread_barrier_t inner;
  explicit Barrier(int threads) { pthread_barrier_init(&inner, nullptr, threads); }
  ~Barrier() { pthread_barrier_destroy(&inner); }
  void wait() { pthread_barrier_wait(&inner); }
};

inline void run(int threads, const std::function<void(int)>& lane) {
  std::vector<std::thread> running;
  for (int thread = 0; thread < threads; thread++) running.emplace_back(lane, thread);
  for (std::thread& thread : running) thread.join();
}
#else
struct Lane {
  ucontext_t start;
  jmp_buf at;
  bool started, done;
};
static std::vector<Lane> lanes;
static const std::function<void(int)>* lane_body;
static int current, remaining;
static jmp_buf all_done;

// Goes on with the next lane that has not ended, where it waited.
[[noreturn]] inline void next_lane() {
  do current = (current + 1) % int(lanes.size());
  while (lanes[current].done);
  Lane& lane = lanes[current];
  if (lane.started) _longjmp(lane.at, 1);
  lane.started = true;
  setcontext(&lane.start);
  std::abort();
}

inline void let_others_run() {
  Emu* const own = pa_emu;
  if (_setjmp(lanes[current].at) == 0) next_lane();
  pa_emu = own;
}

inline void whole_lane() {
  (*lane_body)(current);
  lanes[current].done = true;
  if (--remaining == 0) _longjmp(all_done, 1);
  next_lane();
}

inline void run(int threads, const std::function<void(int)>& body) {
  const size_t size = 1 << 20;
  char* stacks = (char*)mmap(nullptr, size * threads, PROT_READ | PROT_WRITE,
                             MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (stacks == MAP_FAILED) std::abort();
  lanes.assign(threads, Lane{});
  for (int thread = 0; thread < threads; thread++) {
    ucontext_t& start = lanes[thread].start;
    getcontext(&start);
    start.uc_stack.ss_sp = stacks + size * thread;
    start.uc_stack.ss_size = size;
    makecontext(&start, whole_lane, 0);
  }
  lane_body = &body;
  current = threads - 1;
  remaining = threads;
  if (_setjmp(all_done) == 0) next_lane();
  munmap(stacks, size * threads);
}

struct Barrier {
  int threads, waiting = 0, turn = 0;
  explicit Barrier(int threads) : threads(threads) {}
  void wait() {
    const int own = turn;
    if (++waiting == threads) {
      waiting = 0;
      turn++;
    }
    while (turn == own) let_others_run();
  }
};
#endif

struct Simdgroup {
  Barrier barrier{32};
  float lanes[2][32];
};

struct Emu {
  int thread, threads, depth, x, y, z;
  Barrier* group;
  Simdgroup* simd;
  int turn = 0;
  void sync() { group->wait(); }
  // Two turns' values are kept, so one barrier is enough: nobody is two turns ahead of another.
  float exchange(float value, int mask) {
    float* lanes = simd->lanes[turn++ & 1];
    lanes[thread & 31] = value;
    simd->barrier.wait();
    return lanes[(thread & 31) ^ mask];
  }
};

struct Grid {
  int x, y, z, threads;
};

template <class Body>
void launch(const Grid& grid, Body body) {
  Barrier group(grid.threads);
  std::vector<Simdgroup> simds(grid.threads / 32);
  run(grid.threads, [&](int thread) {
    Emu emu{thread, grid.threads, grid.z, 0, 0, 0, &group, &simds[thread / 32]};
    for (emu.z = 0; emu.z < grid.z; emu.z++) {
      for (emu.y = 0; emu.y < grid.y; emu.y++) {
        for (emu.x = 0; emu.x < grid.x; emu.x++) {
          body(emu);
          group.wait();
        }
      }
    }
  });
}

// An array in a file, in memory of its exact size; written back if it is an output.
struct Array {
  std::string path;
  std::unique_ptr<char[]> data;
  size_t bytes;
  bool output;
  std::vector<int> shape;
  Array(const std::string& directory, const char* name, bool is_output) : output(is_output) {
    path = directory + "/" + name;
    bytes = read(path + ".data", data);
    std::unique_ptr<char[]> sizes;
    const size_t n = read(path + ".shape", sizes) / sizeof(int);
    shape.resize(n);
    std::memcpy(shape.data(), sizes.get(), n * sizeof(int));
  }
  Array(Array&&) = default;
  ~Array() {
    if (!data || !output) return;
    FILE* file = std::fopen((path + ".data").c_str(), "wb");
    if (!file || std::fwrite(data.get(), 1, bytes, file) != bytes) std::abort();
    std::fclose(file);
  }
  template <class E>
  E* as() { return reinterpret_cast<E*>(data.get()); }

  static size_t read(const std::string& path, std::unique_ptr<char[]>& data) {
    FILE* file = std::fopen(path.c_str(), "rb");
    if (!file) std::exit(3);
    std::fseek(file, 0, SEEK_END);
    const size_t bytes = std::ftell(file);
    std::rewind(file);
    data.reset(new char[bytes]);
    if (std::fread(data.get(), 1, bytes, file) != bytes) std::exit(3);
    std::fclose(file);
    return bytes;
  }
};
