/*
 * test_rate.c - the token bucket by a clock of the test's own, and waiting for it
 */
#include "engine/rate.h"

#include <pthread.h>

#include "tests/test_util.h"

#define KIB UINT64_C(1024)
#define MIB (1024 * KIB)
#define SECOND UINT64_C(1000000000)

/* A run of requests, each at the first moment that the bucket allows. */
struct run {
	struct bucket bucket;
	uint64_t now_ns;
	uint64_t times[4096], sizes[4096];
	size_t n;
};

static void request(struct run *run, uint64_t nbytes)
{
	for (uint64_t wait; (wait = imgc_bucket_take(&run->bucket, nbytes, run->now_ns)) != 0;)
		run->now_ns += wait;
	run->times[run->n] = run->now_ns;
	run->sizes[run->n++] = nbytes;
}

/* No second has more than the rate and one request of `largest`, or a quarter of it. */
static void check_seconds(const struct run *run, uint64_t rate, uint64_t largest)
{
	for (size_t first = 0; first < run->n; first++) {
		uint64_t sum = 0;

		for (size_t i = first; i < run->n && run->times[i] < run->times[first] + SECOND;
		     i++)
			sum += run->sizes[i];
		CHECK(sum <= rate + (largest > rate / 4 ? largest : rate / 4));
	}
}

static void test_a_second_admits_its_rate(void)
{
	static const uint64_t rates[] = {1 * KIB, 64 * KIB, 10 * MIB, 3000 * MIB};

	for (size_t i = 0; i < sizeof(rates) / sizeof(rates[0]); i++) {
		struct run run = {.bucket = {.filled_ns = 5 * SECOND}, .now_ns = 5 * SECOND};
		uint64_t state = 7 + i, sum = 0;

		imgc_bucket_set_rate(&run.bucket, rates[i], run.now_ns);
		while (run.n < 4096) {
			uint64_t r = test_random(&state);

			if (r % 16 == 0) /* the workers were busy elsewhere */
				run.now_ns += (r >> 8) % (2 * SECOND);
			request(&run, 1 + (r >> 20) % (512 * KIB));
			sum += run.sizes[run.n - 1];
		}
		check_seconds(&run, rates[i], 512 * KIB);
		CHECK((double)(run.now_ns - 5 * SECOND) / SECOND >= (double)sum / (double)rates[i]);
	}
}

static void test_a_steady_run_reaches_its_rate(void)
{
	struct run run = {0};

	imgc_bucket_set_rate(&run.bucket, 8 * MIB, 0);
	for (unsigned i = 0; i < 64; i++)
		request(&run, 512 * KIB);
	/* 32 MiB: 4 s, and less than a microsecond lost by rounding. */
	CHECK(run.now_ns >= 4 * SECOND && run.now_ns < 4 * SECOND + 1000);
}

/* A machine that is busy elsewhere for 0.2 s now and then still reaches the rate. */
static void test_lateness_is_made_up_for(void)
{
	struct run run = {0};

	imgc_bucket_set_rate(&run.bucket, 400 * MIB, 0);
	for (unsigned i = 0; i < 4000; i++) {
		if (i % 400 == 0)
			run.now_ns += SECOND / 5;
		request(&run, 512 * KIB);
	}
	/* 2000 MiB: 5 s. */
	CHECK(run.now_ns >= 5 * SECOND && run.now_ns < 5 * SECOND + SECOND / 4);
}

static void test_a_pause_saves_one_request_at_most(void)
{
	struct run run = {0};

	imgc_bucket_set_rate(&run.bucket, 1 * MIB, 0);
	request(&run, 512 * KIB);
	CHECK(run.now_ns >= SECOND / 2);
	run.now_ns += 100 * SECOND;
	CHECK_EQ(imgc_bucket_take(&run.bucket, 512 * KIB, run.now_ns), 0);
	CHECK(imgc_bucket_take(&run.bucket, 1, run.now_ns) > 0);
}

static void test_rates_change_at_once(void)
{
	struct bucket b = {0};

	CHECK_EQ(imgc_bucket_take(&b, UINT64_MAX, 0), 0); /* no limit */
	imgc_bucket_set_rate(&b, 1000, 0);
	CHECK_EQ(imgc_bucket_take(&b, 0, 0), 0); /* nothing waits for nothing */
	CHECK_EQ((imgc_bucket_take(&b, 1000, 0) + 500) / 1000, 1000000);
	/* Half of it is there when the rate rises by ten. */
	imgc_bucket_set_rate(&b, 10000, SECOND / 2);
	CHECK_EQ((imgc_bucket_take(&b, 1000, SECOND / 2) + 500) / 1000, 50000);
	imgc_bucket_set_rate(&b, 0, SECOND / 2);
	CHECK_EQ(imgc_bucket_take(&b, 1000, SECOND / 2), 0);
}

static void test_a_pause_gives_nothing_and_saves_nothing(void)
{
	struct bucket b = {0};

	imgc_bucket_pause(&b, true, 0);
	CHECK(imgc_bucket_take(&b, 0, 0) > 0); /* not even nothing, without a rate */
	imgc_bucket_set_rate(&b, 1000, SECOND);
	CHECK(imgc_bucket_take(&b, 1000, 100 * SECOND) > 0);
	imgc_bucket_pause(&b, false, 200 * SECOND);
	CHECK_EQ(imgc_bucket_take(&b, 0, 200 * SECOND), 0);
	/* The rate that was set meanwhile counts from now on. */
	CHECK_EQ((imgc_bucket_take(&b, 1000, 200 * SECOND) + 500) / 1000, 1000000);
	CHECK_EQ(imgc_bucket_take(&b, 1000, 202 * SECOND), 0);
}

static void test_extreme_rates_do_not_overflow(void)
{
	struct bucket b = {0};

	imgc_bucket_set_rate(&b, 1, 0);
	CHECK(imgc_bucket_take(&b, INT64_MAX, 0) > 0);
	imgc_bucket_set_rate(&b, INT64_MAX, 0);
	CHECK_EQ(imgc_bucket_take(&b, INT64_MAX, 2 * SECOND), 0);
}

/* A thread that waits for more than will ever come, until the rate is lifted. */
static void *wait_for_long(void *argument)
{
	struct imgc_rate_limit *limit = argument;

	CHECK_EQ(imgc_rate_limit_take(limit, INT64_MAX, 600 * 1000), 1);
	return NULL;
}

static void test_waiting(void)
{
	struct imgc_rate_limit *limit;
	pthread_t thread;

	CHECK_EQ(imgc_rate_limit_create(&limit), IMGC_OK);
	CHECK_EQ(imgc_rate_limit_take(limit, INT64_MAX, 0), 1);
	imgc_rate_limit_set(limit, 1);
	CHECK_EQ(imgc_rate_limit_take(limit, INT64_MAX, 0), 0);
	CHECK_EQ(imgc_rate_limit_take(limit, INT64_MAX, 1), 0);
	CHECK_EQ(pthread_create(&thread, NULL, wait_for_long, limit), 0);
	imgc_rate_limit_set(limit, 2);
	imgc_rate_limit_pause(limit, 1);
	imgc_rate_limit_set(limit, 0);
	CHECK_EQ(imgc_rate_limit_take(limit, 0, 1), 0);
	imgc_rate_limit_pause(limit, 0);
	CHECK_EQ(pthread_join(thread, NULL), 0);
	imgc_rate_limit_destroy(limit);
	imgc_rate_limit_destroy(NULL);
}

int main(void)
{
	test_a_second_admits_its_rate();
	test_a_steady_run_reaches_its_rate();
	test_lateness_is_made_up_for();
	test_a_pause_saves_one_request_at_most();
	test_rates_change_at_once();
	test_a_pause_gives_nothing_and_saves_nothing();
	test_extreme_rates_do_not_overflow();
	test_waiting();
	return 0;
}
