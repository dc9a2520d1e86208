// Bytes per second that plain loads get: read_bandwidth THREADS ROUNDS MEBIBYTES prints one figure a round.
// Every thread sums its own part with 8 accumulators; the sum is printed to stderr, so that no load can be dropped.
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

typedef uint64_t vec __attribute__((vector_size(32)));
typedef struct { const vec *data; size_t count; uint64_t sum; } part;

static void *read_part(void *argument) {
    part *p = argument;
    vec a[8] = {0};
    for (size_t i = 0; i < p->count; i += 8)
        for (int j = 0; j < 8; j++) a[j] += p->data[i + j];
    for (int j = 1; j < 8; j++) a[0] += a[j];
    p->sum += a[0][0] + a[0][1] + a[0][2] + a[0][3];
    return NULL;
}

int main(int argc, char **argv) {
    if (argc != 4) return 2;
    int threads = atoi(argv[1]), rounds = atoi(argv[2]);
    size_t bytes = (size_t)atol(argv[3]) << 20, count = bytes / sizeof(vec) / threads / 8 * 8;
    vec *data = aligned_alloc(4096, bytes);
    for (size_t i = 0; i < bytes / 8; i++) ((uint64_t *)data)[i] = i;
    part *parts = calloc(threads, sizeof *parts);
    pthread_t *ids = calloc(threads, sizeof *ids);
    for (int round = -2; round < rounds; round++) {  // two warm up
        struct timespec from, to;
        clock_gettime(CLOCK_MONOTONIC, &from);
        for (int t = 0; t < threads; t++) {
            parts[t].data = data + t * count;
            parts[t].count = count;
            if (t) pthread_create(&ids[t], NULL, read_part, &parts[t]);
        }
        read_part(&parts[0]);
        for (int t = 1; t < threads; t++) pthread_join(ids[t], NULL);
        clock_gettime(CLOCK_MONOTONIC, &to);
        double seconds = (to.tv_sec - from.tv_sec) + (to.tv_nsec - from.tv_nsec) * 1e-9;
        if (round >= 0) printf("%.0f\n", threads * count * sizeof(vec) / seconds);
    }
    for (int t = 0; t < threads; t++) fprintf(stderr, "%lu\n", (unsigned long)parts[t].sum);
}
