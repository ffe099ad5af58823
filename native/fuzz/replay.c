/*
 * replay.c - runs a fuzz target on the files named on the command line
 */
#include "fuzz/fuzz_util.h"

static uint8_t *read_all(const char *path, size_t *nbytes)
{
	FILE *file = fopen(path, "rb");

	REQUIRE(file != NULL && fseek(file, 0, SEEK_END) == 0);
	long end = ftell(file);
	REQUIRE(end >= 0 && fseek(file, 0, SEEK_SET) == 0);
	*nbytes = (size_t)end;
	uint8_t *data = malloc(*nbytes ? *nbytes : 1);
	REQUIRE(data != NULL && fread(data, 1, *nbytes, file) == *nbytes);
	fclose(file);
	return data;
}

int main(int argc, char **argv)
{
	for (int i = 1; i < argc; i++) {
		size_t nbytes;
		uint8_t *data = read_all(argv[i], &nbytes);

		LLVMFuzzerTestOneInput(data, nbytes);
		free(data);
	}
	printf("%s: %d inputs\n", argv[0], argc - 1);
	return 0;
}
