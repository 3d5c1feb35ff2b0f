// CUDA: copies of whole pieces of memory to shared memory, and the barriers that tell when they are there.
// (PTX ISA: cp.async.bulk, mbarrier; compute capability 9.0.)
typedef unsigned long long PaBarrier;
__device__ inline unsigned pa_shared_address(const void* at) {
  return static_cast<unsigned>(__cvta_generic_to_shared(at));
}
__device__ inline void pa_barrier_make(PaBarrier* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(pa_shared_address(barrier)), "r"(arrivals)
               : "memory");
}
// Before a block's first copy: the barriers that it made are seen by the engine that copies.
__device__ inline void pa_barriers_made() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
// Arrive, and say how many bytes are to come.
__device__ inline void pa_barrier_expect(PaBarrier* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(pa_shared_address(barrier)),
               "r"(bytes)
               : "memory");
}
__device__ inline void pa_barrier_arrive(PaBarrier* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(pa_shared_address(barrier)) : "memory");
}
// Arrive when this thread's copies so far (cp.async) are there.
__device__ inline void pa_barrier_arrive_after_copies(PaBarrier* barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(pa_shared_address(barrier)) : "memory");
}
// Wait until the barrier has completed its phase number 0, 2, 4... (parity 0) or 1, 3, 5...
__device__ inline void pa_barrier_wait(PaBarrier* barrier, int parity) {
  asm volatile("{.reg .pred p;\nPA_WAIT_%=:\nmbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
               "@!p bra PA_WAIT_%=;\n}" ::"r"(pa_shared_address(barrier)), "r"(parity)
               : "memory");
}
// Copy a multiple of 16 bytes, of which the barrier is told.
__device__ inline void pa_bulk_copy(void* to, const void* from, int bytes, PaBarrier* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   pa_shared_address(to)), "l"(from), "r"(bytes), "r"(pa_shared_address(barrier))
               : "memory");
}
// Wait for the first THREADS threads of a block.
template <int THREADS>
__device__ inline void pa_sync_first() {
  asm volatile("bar.sync 1, %0;" ::"n"(THREADS) : "memory");
}
__device__ inline void pa_sync_warp() { __syncwarp(); }
