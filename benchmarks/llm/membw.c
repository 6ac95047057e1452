/* How fast this machine reads memory: best of several passes over so many bytes, by 1 to as many threads as there are processors.
 *
 *   cc -O3 -march=native -fopenmp membw.c -o membw;  membw BYTES...      prints one JSON line per size and number of threads
 */
#include <err.h>
#include <omp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define LANES 128 /* sums side by side, enough to hide the latency of an addition */
#define SECONDS 1.0

static double best_gb_per_s(const float *a, size_t count) {
    double best = 0, until = omp_get_wtime() + SECONDS;
    do {
        float sum = 0;
        double began = omp_get_wtime();
#pragma omp parallel reduction(+ : sum)
        {
            size_t threads = omp_get_num_threads(), me = omp_get_thread_num();
            size_t from = count / threads * me, to = count / threads * (me + 1);
            float lanes[LANES] = {0};
            for (size_t i = from; i + LANES <= to; i += LANES)
                for (int j = 0; j < LANES; j++) lanes[j] += a[i + j];
            for (int j = 0; j < LANES; j++) sum += lanes[j];
        }
        double rate = count * sizeof *a / (omp_get_wtime() - began) / 1e9;
        volatile float used = sum;
        (void)used;
        if (rate > best) best = rate;
    } while (omp_get_wtime() < until);
    return best;
}

int main(int argc, char **argv) {
    for (int i = 1; i < argc; i++) {
        size_t count = atoll(argv[i]) / sizeof(float);
        float *a = aligned_alloc(4096, (count * sizeof *a + 4095) / 4096 * 4096);
        if (!a || !count) errx(1, "usage: membw BYTES...");
        memset(a, 1, count * sizeof *a);
        for (int threads = 1; threads <= omp_get_num_procs(); threads++) {
            omp_set_num_threads(threads);
            printf("{\"bytes\": %zu, \"threads\": %d, \"gb_per_s\": %.2f}\n", count * sizeof *a, threads, best_gb_per_s(a, count));
        }
        free(a);
    }
    return 0;
}
