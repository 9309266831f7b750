/* Read bandwidth: bandwidth BYTES THREADS SECONDS sums a buffer again and again, and prints the best pass in GB/s. */
#include <omp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

typedef long long vec __attribute__((vector_size(64)));

static long long sum(const vec *p, size_t n) {
    vec a = {0}, b = {0}, c = {0}, d = {0};
    for (size_t i = 0; i + 4 <= n; i += 4) {
        a += p[i];
        b += p[i + 1];
        c += p[i + 2];
        d += p[i + 3];
    }
    a += b + c + d;
    return a[0] + a[1] + a[2] + a[3] + a[4] + a[5] + a[6] + a[7];
}

int main(int argc, char **argv) {
    if (argc != 4) {
        fprintf(stderr, "bandwidth BYTES THREADS SECONDS\n");
        return 2;
    }
    const int threads = atoi(argv[2]);
    const size_t each = strtoull(argv[1], NULL, 10) / sizeof(vec) / threads, bytes = each * threads * sizeof(vec);
    const size_t page = 2 << 20, size = (bytes + page - 1) / page * page;
    vec *buffer = aligned_alloc(page, size);
    if (!buffer || !each) {
        fprintf(stderr, "no buffer of %zu bytes\n", bytes);
        return 1;
    }
#ifdef MADV_HUGEPAGE
    madvise(buffer, size, MADV_HUGEPAGE); /* small pages are read at half the rate */
#endif
    memset(buffer, 1, bytes);
    omp_set_num_threads(threads);
    long long total = 0;
    double best = 0;
    const double end = omp_get_wtime() + atof(argv[3]);
    do {
        const double started = omp_get_wtime();
#pragma omp parallel reduction(+ : total)
        total += sum(buffer + each * omp_get_thread_num(), each);
        const double rate = bytes / (omp_get_wtime() - started) / 1e9;
        best = rate > best ? rate : best;
    } while (omp_get_wtime() < end);
    fprintf(stderr, "%lld\n", total); /* so that the sums are computed */
    printf("%.2f\n", best);
    return 0;
}
