# Settings of a process on a machine without a GPU; sourced by the launchers, and safe to source in a shell of your own.
#   OMP_NUM_THREADS   computing threads of a process (default: the cores that are idle now, at least one)
if ! command -v nvidia-smi >/dev/null 2>&1; then
  # Threads wait for one another after every operation, and long on a core that another program holds: two threads can then
  # be many times slower than one. So no more threads than idle cores, and short spinning, which leaves the core to whoever is
  # waited for.
  if [ -z "${OMP_NUM_THREADS:-}" ]; then
    OMP_NUM_THREADS="$(python3 -c 'import os; print(max(1, round(len(os.sched_getaffinity(0)) - os.getloadavg()[0])))' 2>/dev/null || echo 1)"
  fi
  export OMP_NUM_THREADS GOMP_SPINCOUNT="${GOMP_SPINCOUNT:-1000}"
  # glibc keeps freed tensors instead of returning them to the kernel after every operation.
  export MALLOC_TOP_PAD_="${MALLOC_TOP_PAD_:-268435456}"
  export MALLOC_TRIM_THRESHOLD_="${MALLOC_TRIM_THRESHOLD_:-4294967296}"
  export MALLOC_MMAP_THRESHOLD_="${MALLOC_MMAP_THRESHOLD_:-4294967296}"
fi
